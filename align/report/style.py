"""How a page looks: its colours, light and dark; its frame; its blocks, which another page may show as well."""

from __future__ import annotations

COLOURS = """
:root { color-scheme: light dark; --ink: #1d1f23; --paper: #ffffff; --faint: #5c6370; --line: #d9dce1; --card: #f5f6f8;
  --link: #0b57a4; --done: #0072b2; --running: #b26b00; --failed: #b3261e; --trained: #ffe9a8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e7ea; --paper: #16181c; --faint: #a2a8b4; --line: #363a43; --card: #1f2228;
    --link: #8ab8f0; --done: #56b4e9; --running: #e69f00; --failed: #f2877f;
    --trained: #4d3f10; }
}
""".strip()

FRAME = """
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 1.25rem 1rem 3rem; color: var(--ink); background: var(--paper);
  font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { margin: 0; font-size: 1.6rem; line-height: 1.25; }
header p { margin: 0.25rem 0 0; color: var(--faint); font-size: 0.9rem; }
""".strip()

BLOCKS = """
h2 { margin: 1.25rem 0 0; font-size: 1.2rem; }
a { color: var(--link); }
.blocks { display: flex; flex-wrap: wrap; gap: 1rem; margin-top: 1rem; }
.blocks > * { flex: 1 1 100%; min-width: 0; margin: 0; }
.blocks > .plot { flex: 1 1 24rem; max-width: 32rem; }
figcaption, dt { color: var(--faint); font-size: 0.9rem; }
p { margin: 0 0 0.6rem; } ul { margin: 0 0 0.6rem; padding-left: 1.25rem; }
.blocks > .verdict { padding: 0.1rem 0 0.1rem 0.9rem; border-left: 0.3rem solid var(--done); font-size: 1.25rem;
  line-height: 1.4; max-width: 52rem; }
.blocks > .verdict.running { border-color: var(--running); } .blocks > .verdict.failed { border-color: var(--failed); }
code { font: 0.9em/1.5 ui-monospace, monospace; background: var(--card); padding: 0.1em 0.3em; border-radius: 3px; }
@media (prefers-color-scheme: dark) { .plot img { filter: invert(1) hue-rotate(180deg); } }
.plot img { display: block; width: 100%; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { padding: 0.4rem 0.9rem 0.4rem 0; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; white-space: pre-wrap; min-width: 4rem; font-weight: 400; overflow-wrap: break-word; }
thead th { color: var(--faint); font-weight: 600; font-size: 0.9rem; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
dl.facts { display: grid; grid-template-columns: minmax(6rem, 11rem) minmax(0, 1fr); gap: 0.35rem 1rem; }
.facts dt, .facts dd { margin: 0; }
.transcript dl, .side { padding: 0.75rem 1rem; background: var(--card); border-radius: 6px; }
.transcript dl { margin: 0.3rem 0 0; }
.transcript dd { margin: 0 0 0.6rem; white-space: pre-wrap; } .transcript dd:last-child { margin-bottom: 0; }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr)); gap: 0.6rem;
  margin: 0.4rem 0 0; }
.sides.pairs { grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
.side dd { margin: 0; white-space: pre-wrap; }
.prompt { color: var(--ink); white-space: pre-wrap; }
.tokens { margin: 0.3rem 0 0; padding: 0.75rem 1rem; background: var(--card); border-radius: 6px; white-space: pre-wrap;
  font: 0.9em/1.7 ui-monospace, monospace; }
.tokens mark { color: inherit; background: var(--trained); border-bottom: 2px solid var(--done);
  box-decoration-break: clone; -webkit-box-decoration-break: clone; }
.tokens code { border: 1px solid var(--faint); font-size: inherit; padding: 0 0.2em; }
.tokens mark code { background: none; } .tokens i { color: var(--faint); }
.tokens mark::before { content: "[trained: "; } .tokens mark::after { content: "]"; }
.tokens mark::before, .tokens mark::after { position: absolute; width: 1px; height: 1px; overflow: hidden;
  clip-path: inset(50%); white-space: nowrap; }
summary { cursor: pointer; color: var(--faint); font-size: 0.9rem; }
details dl { margin: 0.2rem 0 0.4rem; } details dd { margin: 0 0 0.4rem; white-space: pre-wrap; }
dd > details { color: var(--faint); font-size: 0.9rem; }
@media (max-width: 30rem) {
  td, th { padding-right: 0.6rem; font-size: 0.9rem; }
  dl.facts { grid-template-columns: minmax(0, 1fr); } .facts dd { margin-bottom: 0.4rem; }
}
""".strip()
"""Of what lies in an element of class `blocks`."""
