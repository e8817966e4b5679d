"""The command line: `specjax generate`, `bench`, `compile`, `doctor`. Nothing below it imports typer or rich."""
