"use strict";

const trace = JSON.parse(document.getElementById("trace").textContent);
const ids = ["choice", "prompt", "scheme", "totals", "settings", "legend", "table", "head", "rows", "text", "tip"];
const at = Object.fromEntries(ids.map((id) => [id, document.getElementById(id)]));

const HEIGHT = 30; // of a round, as in the styles
const SPARE = 12; // rounds kept above and below what is seen
const KINDS = {
  accepted: "drafted and kept",
  rejected: "drafted, not kept",
  unused: "after a rejected one",
  corrected: "the target’s, for a rejected one",
  bonus: "the target’s, after a whole draft",
  first: "from the prompt",
};

let row, rounds, drafts; // the chosen prompt, its rounds with what came before the first, and K
const shown = new Map(); // the rounds that are in the document: place -> element
const active = { round: 0, column: 0 }; // the one cell that Tab leads to
let pointed = null; // the cell whose probabilities are shown

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

// ---- Text: invisible characters get a sign ----

const SIGNS = { " ": "·", "\n": "↵", "\r": "␍", "\t": "⇥" };
const UNSEEN = /([ \n\r\t]+|(?! )[\p{Zs}\p{Zl}\p{Zp}\p{Cc}\p{Cs}\p{Co}]|(?!\u200d)\p{Cf}|^\u200d$)/u;

function sign(character) {
  const code = character.codePointAt(0);
  if (SIGNS[character]) return SIGNS[character];
  if (code < 32) return String.fromCodePoint(0x2400 + code);
  return `‹${code.toString(16).toUpperCase().padStart(4, "0")}›`;
}

function visible(text) {
  return text.split(UNSEEN).map((part, place) => (place % 2 ? make("i", {}, [...part].map(sign).join("")) : part));
}

function tokenElement(token) {
  const parts = token.text === "" ? [`#${token.id}`] : visible(token.text).filter((part) => part !== "");
  const blank = parts.every((part) => part.tagName) ? " blank" : "";
  return make("span", { className: `token ${token.kind}${blank}` }, ...parts);
}

function percent(share) {
  return share === null ? "–" : `${Math.round(100 * share)}%`;
}

function probability(value) {
  if (value === null) return "–";
  return value === 0 || value === 1 ? String(value) : value >= 5e-5 ? value.toFixed(4) : value.toExponential(1);
}

// ---- The facts above the rounds ----

function fact(list, name, value, note) {
  list.append(make("div", {}, make("dt", {}, name), make("dd", {}, value, ...(note ? [" ", make("small", {}, note)] : []))));
}

function drawTotals() {
  const several = trace.rows.length > 1;
  const all = trace.totals;
  const own = row.totals;
  const sum = (counts) => counts.reduce((total, count) => total + count, 0);
  const digits = (value) => (value === null ? "–" : value.toFixed(2));
  const among = (value) => (several ? `all prompts ${value}` : "");
  at.totals.replaceChildren();
  fact(at.totals, "tokens", own.tokens, among(all.tokens));
  fact(at.totals, "rounds", own.rounds, among(all.rounds));
  fact(at.totals, "tokens per round", digits(own.tokens_per_round), several ? among(digits(all.tokens_per_round)) : `of ${drafts + 1}`);
  const kept = `${sum(own.accepted)} of ${sum(own.drafted)} drafted`;
  fact(at.totals, "acceptance", percent(own.acceptance_rate), several ? `${kept}, ${among(percent(all.acceptance_rate))}` : kept);
  at.settings.replaceChildren();
  for (const [name, value] of Object.entries({ ...trace.settings, ended: row.ended })) {
    const short = typeof value === "number" && !Number.isInteger(value) ? Number(value.toPrecision(3)) : value;
    if (value !== null) fact(at.settings, name, String(short));
  }
}

function drawHead() {
  const { tested, accepted, acceptance_by_position: shares } = row.totals;
  const header = (text, className = "") => {
    const cell = make("div", { className }, text);
    cell.setAttribute("role", "columnheader");
    return cell;
  };
  const positions = shares.map((share, place) => {
    const cell = header("", "position");
    cell.title = `Draft position ${place + 1}: ${accepted[place]} of ${tested[place]} tokens kept where all before were`;
    cell.style.setProperty("--share", share ?? 0);
    cell.append(make("b", {}, String(place + 1)), make("span", {}, percent(share)));
    return cell;
  });
  at.head.replaceChildren(header("round"), ...positions, header("target"), header("tokens", "count"));
}

function drawLegend() {
  for (const [kind, meaning] of Object.entries(KINDS)) {
    at.legend.append(make("li", {}, make("span", { className: `token ${kind}` }, kind), meaning));
  }
}

// ---- The text: one element per round, and one in it for the target's token ----

function textElement(round, place) {
  const { target, text } = round;
  const element = make("span");
  element.dataset.place = place;
  const marked = target && target.text && text.endsWith(target.text) ? target.text : "";
  element.append(text.slice(0, text.length - marked.length));
  if (marked) element.append(make("span", { className: `mark ${target.kind}` }, marked));
  return element;
}

function drawText() {
  at.text.replaceChildren(make("span", { className: "prompt" }, row.prompt), ...rounds.map(textElement));
  at.text.scrollTop = 0;
}

function markRound(place) {
  at.text.querySelector(".here")?.classList.remove("here");
  at.text.children[place + 1]?.classList.add("here");
}

function revealText(place) {
  const box = at.text.getBoundingClientRect();
  const { top, bottom } = at.text.children[place + 1].getBoundingClientRect();
  if (top < box.top || bottom > box.bottom) at.text.scrollTop += top - box.top - box.height / 3;
}

// ---- Rounds: only those in sight are in the document ----

function cell(element, column, label) {
  element.setAttribute("role", "gridcell");
  element.setAttribute("aria-colindex", column + 1);
  element.tabIndex = -1;
  element.dataset.column = column;
  if (label) element.setAttribute("aria-label", label);
  return element;
}

function spoken(token) {
  const parts = probabilities(token).map(([name, , value]) => `${name} ${probability(value)}`);
  return [`${token.kind} ${JSON.stringify(token.text)}`, ...parts].join(", ");
}

function roundElement(place) {
  const { draft, target } = rounds[place];
  const element = make("div", { className: "row" });
  element.setAttribute("role", "row");
  element.setAttribute("aria-rowindex", place + 2);
  element.style.transform = `translateY(${place * HEIGHT}px)`;
  element.dataset.round = place;
  element.append(cell(make("span", { className: "index" }, place === 0 ? "prompt" : String(place)), 0));
  for (let column = 1; column <= drafts; column++) {
    const token = draft[column - 1];
    element.append(token ? cell(tokenElement(token), column, spoken(token)) : cell(make("span"), column));
  }
  element.append(target ? cell(tokenElement(target), drafts + 1, spoken(target)) : cell(make("span"), drafts + 1));
  const emitted = draft.filter((token) => token.kind === "accepted").length + (target ? 1 : 0);
  const count = make("span", { className: "count" }, String(emitted));
  count.style.setProperty("--share", emitted / (drafts + 1));
  element.append(cell(count, drafts + 2));
  return element;
}

function drawRounds() {
  const top = at.table.scrollTop;
  const first = Math.max(0, Math.floor(top / HEIGHT) - SPARE);
  const last = Math.min(rounds.length - 1, Math.ceil((top + at.table.clientHeight) / HEIGHT) + SPARE);
  for (const [place, element] of shown) {
    // The focused round stays, wherever it is: focus would be lost with it.
    if ((place < first || place > last) && !element.contains(document.activeElement)) {
      element.remove();
      shown.delete(place);
    }
  }
  const added = [];
  for (let place = first; place <= last; place++) {
    if (shown.has(place)) continue;
    const element = roundElement(place);
    shown.set(place, element);
    added.push(element);
  }
  at.rows.append(...added);
  shown.get(active.round)?.children[active.column]?.setAttribute("tabindex", 0);
}

function cellAt(place, column) {
  return shown.get(place)?.children[column];
}

function activate(place, column) {
  cellAt(active.round, active.column)?.setAttribute("tabindex", -1);
  active.round = place;
  active.column = column;
  cellAt(place, column)?.setAttribute("tabindex", 0);
}

function show(place, column = active.column) {
  const top = place * HEIGHT;
  const room = at.table.clientHeight - at.head.offsetHeight;
  if (top < at.table.scrollTop) at.table.scrollTop = top;
  if (top + HEIGHT > at.table.scrollTop + room) at.table.scrollTop = top + HEIGHT - room;
  drawRounds();
  activate(place, column);
  cellAt(place, column).focus({ preventScroll: true });
  cellAt(place, column).scrollIntoView({ block: "nearest", inline: "nearest" });
}

// ---- Probabilities of the cell that is pointed at or focused ----

function probabilities(token) {
  const all = [["draft", "--quiet", token.draft_prob], ["target", "--focus", token.target_prob], ["target, raw", "--bonus-line", token.model_prob]];
  return all.filter(([, , value], place) => value !== null && (place < 2 || probability(value) !== probability(token.target_prob)));
}

function tokenOf(element) {
  const { draft, target } = rounds[element.parentElement.dataset.round];
  const column = Number(element.dataset.column);
  return column > drafts ? (column === drafts + 1 ? target : undefined) : draft[column - 1];
}

function drawTip(token, place, column) {
  const where = place === 0 ? "" : column > drafts ? `round ${place},` : `round ${place}, position ${column},`;
  const bars = probabilities(token).map(([name, colour, value]) => {
    const bar = make("div", { className: "probability" }, make("b", {}, probability(value)));
    bar.dataset.name = name;
    bar.style.setProperty("--share", value);
    bar.style.setProperty("--prob-colour", `var(${colour})`);
    return bar;
  });
  const note = make("p", {}, `${token.kind}: ${KINDS[token.kind]}`);
  at.tip.replaceChildren(make("div", { className: "what" }, tokenElement(token), make("span", {}, `${where} id ${token.id}`)), note, ...bars);
}

function place(element) {
  const box = element.getBoundingClientRect();
  const above = box.bottom + 190 > innerHeight;
  at.tip.style.left = `${Math.max(8, Math.min(box.left, innerWidth - 304))}px`;
  at.tip.style.top = above ? "auto" : `${box.bottom + 7}px`;
  at.tip.style.bottom = above ? `${innerHeight - box.top + 7}px` : "auto";
}

function point(element) {
  if (element === pointed) return;
  pointed = element;
  const token = element && tokenOf(element);
  at.tip.hidden = !token;
  markRound(element ? Number(element.parentElement.dataset.round) : -2);
  if (!token) return;
  place(element); // reads the layout before anything is written
  drawTip(token, Number(element.parentElement.dataset.round), Number(element.dataset.column));
}

// ---- Events ----

function choose(index) {
  row = trace.rows[index];
  rounds = row ? [row.start, ...row.rounds] : [];
  drafts = row ? row.totals.drafted.length : 0;
  at.table.style.setProperty("--drafts", Math.max(drafts, 1));
  at.table.style.setProperty("--narrowest", `${250 + 84 * drafts}px`);
  at.table.setAttribute("aria-rowcount", rounds.length + 1);
  at.table.setAttribute("aria-colcount", drafts + 3);
  at.rows.style.height = `${rounds.length * HEIGHT}px`;
  point(null);
  shown.clear();
  at.rows.replaceChildren();
  at.table.scrollTop = 0;
  active.round = 0;
  active.column = drafts + 1;
  if (!row) return;
  drawTotals();
  drawHead();
  drawText();
  drawRounds();
}

function listen() {
  let waiting = false;
  const later = () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      drawRounds();
      if (pointed) place(pointed);
    });
  };
  const scrolled = () => {
    if (pointed !== document.activeElement) point(null); // what was pointed at has moved away
    later();
  };
  at.table.addEventListener("scroll", scrolled, { passive: true });
  new ResizeObserver(later).observe(at.table);

  const cellOf = (event) => event.target.closest?.("[data-column]") ?? null;
  at.rows.addEventListener("pointerover", (event) => point(cellOf(event)));
  at.rows.addEventListener("pointerleave", () => point(null));
  at.rows.addEventListener("focusin", (event) => {
    const element = cellOf(event);
    activate(Number(element.parentElement.dataset.round), Number(element.dataset.column));
    point(element);
    revealText(active.round);
  });
  at.rows.addEventListener("focusout", () => point(null));

  at.table.addEventListener("keydown", (event) => {
    const page = Math.max(1, Math.floor(at.table.clientHeight / HEIGHT) - 2);
    const end = rounds.length - 1;
    const step = { ArrowUp: -1, ArrowDown: 1, PageUp: -page, PageDown: page, Home: -end, End: end }[event.key] ?? 0;
    const aside = { ArrowLeft: -1, ArrowRight: 1 }[event.key] ?? 0;
    if (event.key === "Escape") at.tip.hidden = true;
    if ((!step && !aside) || event.target === at.table) return;
    event.preventDefault();
    const clamp = (value, most) => Math.max(0, Math.min(value, most));
    show(clamp(active.round + step, end), clamp(active.column + aside, drafts + 2));
  });
  document.addEventListener("keydown", (event) => event.key === "Escape" && (at.tip.hidden = true));

  at.text.addEventListener("click", (event) => {
    const found = event.target.closest("[data-place]");
    if (found && getSelection().isCollapsed) show(Number(found.dataset.place));
  });
  at.prompt.addEventListener("change", () => choose(Number(at.prompt.value)));
}

function drawChoice() {
  at.choice.hidden = trace.rows.length < 2;
  trace.rows.forEach(({ prompt }, index) => {
    const short = [...prompt.replace(/\s+/g, " ").trim()].slice(0, 56).join("");
    at.prompt.append(make("option", { value: index }, `${index + 1}. ${short}`));
  });
}

function drawScheme() {
  const system = matchMedia("(prefers-color-scheme: dark)");
  const root = document.documentElement;
  const isDark = () => (root.style.colorScheme || (system.matches ? "dark" : "light")) === "dark";
  const name = () => {
    at.scheme.textContent = isDark() ? "Light" : "Dark";
    at.scheme.title = `Show the page in ${isDark() ? "light" : "dark"} colours`;
  };
  at.scheme.addEventListener("click", () => {
    root.style.colorScheme = isDark() ? "light" : "dark";
    name();
  });
  system.addEventListener("change", name);
  name();
}

drawScheme();
drawChoice();
drawLegend();
listen();
choose(0);
