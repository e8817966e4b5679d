// Browsers refuse a worker to pages that are read from a folder. There the search runs in a hidden frame instead.
if (location.protocol === "file:")
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      const inside = frame.contentWindow;
      inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      const script = inside.document.createElement("script");
      this.loaded = new Promise((done) => script.addEventListener("load", done));
      script.src = url;
      inside.document.body.append(script);
      this.send = (data) => inside.dispatchEvent(new inside.MessageEvent("message", { data }));
    }

    postMessage(data) {
      this.loaded.then(() => this.send(data));
    }
  };
