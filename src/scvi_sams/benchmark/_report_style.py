"""How the report looks, on wide and on narrow screens and on paper."""

STYLE = """
:root { color-scheme: light; --ink: #1b1f24; --soft: #57606a; --line: #d8dee4; --paper: #fff;
  --shade: #f4f6f8; --accent: #005a8f; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: var(--paper);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
main { max-width: 84rem; margin: 0 auto; padding: 1rem clamp(0.75rem, 3vw, 2.5rem) 3rem; }
h1 { font-size: clamp(1.4rem, 4vw, 2rem); line-height: 1.2; margin: 0.5rem 0; }
h2 { font-size: 1.25rem; margin: 2.2rem 0 0.6rem; padding-top: 0.6rem;
  border-top: 1px solid var(--line); }
p { max-width: 50rem; }
nav { display: flex; flex-wrap: wrap; gap: 0.3rem 1.1rem; font-size: 0.9rem; }
a { color: var(--accent); }
dl { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: 0.25rem 1rem; }
dt { font-weight: 600; }
dd { margin: 0; overflow-wrap: anywhere; }
.wide { overflow-x: auto; margin: 0.8rem 0; border: 1px solid var(--line); border-radius: 6px; }
.wide:focus-visible { outline: 3px solid var(--accent); }
table { border-collapse: separate; border-spacing: 0; font-size: 0.85rem; width: 100%;
  font-variant-numeric: tabular-nums; }
th, td { padding: 0.4rem 0.6rem; text-align: left; vertical-align: top; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
tbody tr:last-child > * { border-bottom: 0; }
thead th { background: var(--shade); font-weight: 600; vertical-align: bottom; }
table.wrap td { white-space: normal; min-width: 5rem; overflow-wrap: break-word; }
table.summary thead tr:nth-child(2) th { white-space: normal; min-width: 6.2rem; }
table.summary th[colspan], table.summary thead tr:nth-child(1) th:not(:first-child) {
  text-align: center; border-left: 1px solid var(--line); }
table.summary tbody th, table.summary thead th:first-child { font-weight: 600; }
table.summary tbody th, table.summary thead tr:first-child th:first-child {
  position: sticky; left: 0; background: var(--paper); border-right: 1px solid var(--line);
  max-width: 11rem; white-space: normal; }
table.summary thead tr:first-child th:first-child { background: var(--shade); }
tr.control > td, table.summary tr.control > th { background: var(--shade); color: #3d444d; }
small { display: block; color: var(--soft); font-weight: 400; font-size: 0.78rem; }
small.failed { color: #a03c00; }
.grid { display: grid; gap: 1.2rem; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); }
.grid.narrow { grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); }
figure { margin: 0; }
figure svg { display: block; width: 100%; height: auto; max-width: 30rem; margin: 0 auto; }
details > summary { cursor: pointer; color: var(--accent); margin: 0.6rem 0; }
@media (max-width: 40rem) {
  dl { grid-template-columns: 1fr; } dt { margin-top: 0.4rem; }
  table.summary tbody th, table.summary thead tr:first-child th:first-child { max-width: 7.5rem; }
}
@media print { nav { display: none; } .wide { overflow: visible; } figure { break-inside: avoid; } }
"""
