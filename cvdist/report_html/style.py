"""The style sheet of a report, for phones, wide screens, dark mode and paper."""

# Blue and green of Okabe and Ito, and lighter shades of them in dark mode. Nothing is indicated by color alone.
CSS = """
:root {
  color-scheme: light dark;
  --ground: #ffffff; --raised: #f5f6f8; --ink: #1d2126; --muted: #5b636d; --line: #dde1e6;
  --link: #005b8e; --good: #007253; --mark: #fff3d6; --mark-line: #b26a00;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --ground: #14171b; --raised: #1e2329; --ink: #e7eaee; --muted: #a3acb7; --line: #343b44;
    --link: #7cc4f0; --good: #4fd0a5; --mark: #3a2f14; --mark-line: #e6a94a;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-padding-top: 1rem; }
body {
  margin: 0 auto; padding: 1.5rem clamp(1rem, 4vw, 2.5rem) 3rem; max-width: 66rem;
  background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif;
}
h1 { margin: 0; font-size: 1.5rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 3rem 0 .6rem; padding-top: .9rem; border-top: 1px solid var(--line); font-size: 1.3rem; }
h3 { margin: 1.5rem 0 .4rem; font-size: 1rem; overflow-wrap: anywhere; }
p { margin: .4rem 0; max-width: 46rem; }
a { color: var(--link); }
code, pre { font: .9em/1.5 ui-monospace, SFMono-Regular, Menlo, "DejaVu Sans Mono", monospace; }
pre {
  margin: .8rem 0; padding: .7rem .9rem; background: var(--raised); border-radius: 6px;
  white-space: pre-wrap; overflow-wrap: anywhere;
}
.muted { color: var(--muted); }
.warning { padding: .6rem .9rem; background: var(--mark); border-left: 4px solid var(--mark-line); }
.score { margin: 1rem 0 .2rem; font-size: clamp(2.4rem, 9vw, 3.6rem); font-weight: 700; line-height: 1.1;
  color: var(--good); font-variant-numeric: tabular-nums; }
.tiles {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .7rem; margin: 1.2rem 0;
}
.tile { padding: .6rem .8rem; background: var(--raised); border-radius: 6px; }
.tile b { display: block; font-size: 1.2rem; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.tile span { color: var(--muted); font-size: .85rem; }
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin: 1.2rem 0 0; padding: 0; list-style: none; }
nav a { display: inline-block; padding: .25rem 0; }
dl { display: grid; grid-template-columns: minmax(8rem, max-content) 1fr; gap: .25rem 1.2rem; margin: .6rem 0; }
dt { color: var(--muted); }
dd { margin: 0; overflow-wrap: anywhere; unicode-bidi: isolate; }
figure { margin: 1.2rem 0 1.8rem; }
figure img { display: block; max-width: 100%; height: auto; background: #fff; border-radius: 6px; }
.zoom {
  display: block; position: relative; overflow-x: auto; width: fit-content; max-width: 100%; cursor: zoom-in;
}
.zoom input { position: absolute; opacity: 0; }
.zoom input:checked + img { max-width: none; cursor: zoom-out; }
.zoom input:focus-visible + img { outline: 3px solid var(--link); outline-offset: -3px; }
.pair figure:has(input:checked) { grid-column: 1 / -1; }
figcaption { margin-top: .4rem; max-width: 46rem; color: var(--muted); font-size: .92rem; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 0 1.5rem; }
.pair figure { margin-bottom: .8rem; }
.scroll { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td {
  padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top;
}
th { color: var(--muted); font-weight: 600; }
.numbers { font-size: .86rem; }
.numbers th, .numbers td { padding: .3rem 0 .3rem .9rem; text-align: right; white-space: nowrap; }
.numbers th { white-space: normal; vertical-align: bottom; }
.numbers th:first-child, .numbers td:first-child { padding-left: 0; }
td { unicode-bidi: isolate; }
.words td { overflow-wrap: anywhere; }
.marked td { background: var(--mark); font-weight: 600; }
.settings { columns: 2 24rem; column-gap: 2.5rem; }
.settings section { break-inside: avoid; }
.settings h3 { margin-top: .2rem; }
.settings table { width: 100%; margin-bottom: 1.4rem; table-layout: fixed; }
.settings td:first-child { width: 46%; color: var(--muted); }
.settings .marked td { color: var(--ink); }
footer { margin-top: 3rem; padding-top: .9rem; border-top: 1px solid var(--line); color: var(--muted);
  font-size: .9rem; overflow-wrap: anywhere; }
@media (max-width: 34rem) {
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: .5rem; }
  body { font-size: 15px; }
}
@media print {
  @page { margin: 14mm; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  nav { display: none; }
  h2, h3, section > p { break-after: avoid; }
  h2 { margin-top: 1.4rem; }
  figure, tr, .tile, p { break-inside: avoid; }
  footer { margin-top: 1rem; padding-top: .3rem; }
  figure img { max-height: 125mm; width: auto; }
  .settings { columns: 2; font-size: 8.5pt; }
  .pair { grid-template-columns: 1fr 1fr; }
  .scroll { overflow: visible; }
  .numbers { font-size: 7.5pt; }
  .numbers th, .numbers td { padding: .15rem .35rem; }
  .tile, pre, .marked td, .warning { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
