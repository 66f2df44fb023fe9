"""The report's style sheet and its script: the pointer's read-out, nothing that the page needs."""

STYLE = """
:root { color-scheme: light dark;
  --paper: #fafaf8; --card: #ffffff; --ink: #1b1d20; --muted: #6a7079; --rule: #e7e6e2;
  --grid: #eeede9; --blue: #2a5bd7; --orange: #c2570c; --red: #c62f2f; --green: #2c7a4b; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #111316; --card: #181b1f; --ink: #e6e8eb; --muted: #949ca6; --rule: #2a2e34;
  --grid: #24282d; --blue: #7aa2ff; --orange: #f2a15a; --red: #ff7b72; --green: #6cc08b; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 ui-sans-serif, system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans",
  "PingFang SC", "Noto Sans CJK SC", sans-serif; font-variant-numeric: tabular-nums; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -.01em;
  overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 44px 0 12px; letter-spacing: -.005em; }
h3 { font-size: 12px; margin: 0 0 6px; color: var(--muted); font-weight: 600;
  text-transform: uppercase; letter-spacing: .06em; }
.lede, .note, .unit, .legend, .small { color: var(--muted); }
.lede { margin: 0; } .small { font-size: 13px; }
.problem { color: var(--red); margin: 8px 0 0; }
.tiles { background: var(--rule); border: 1px solid var(--rule); border-radius: 10px;
  overflow: hidden; margin: 28px 0 16px; display: grid; gap: 1px; }
.row { display: flex; flex-wrap: wrap; gap: 1px; }
.tile { background: var(--card); padding: 13px 16px 12px; flex: 1 1 150px; }
.tile.first { flex-basis: 30%; } .tile.first b { font-size: 32px; }
.tile b { display: block; font-size: 22px; line-height: 1.25; font-weight: 600;
  letter-spacing: -.02em; }
.tile b small { font-size: 13px; font-weight: 400; color: var(--muted); letter-spacing: 0;
  margin-left: 4px; }
.tile span { font-size: 13px; color: var(--muted); display: block; }
.charts { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 16px; }
.card, .chart { background: var(--card); border: 1px solid var(--rule); border-radius: 10px;
  margin: 0; padding: 14px 16px 12px; min-width: 0; }
.chart.wide { grid-column: 1 / -1; }
figcaption { display: flex; flex-wrap: wrap; gap: 2px 10px; align-items: baseline;
  font-size: 14px; margin-bottom: 12px; }
.unit, .legend { font-size: 12.5px; }
.legend { margin-left: auto; display: flex; flex-wrap: wrap; gap: 2px 14px; }
.key { display: inline-block; width: 16px; margin-right: 6px; vertical-align: middle;
  border-top: 2px solid currentColor; }
.key.thin { border-top-width: 4px; opacity: .35; }
.key.dashed { border-top: 1.5px dashed currentColor; }
.key.dots { width: 8px; height: 8px; border: 0; border-radius: 4px; background: currentColor; }
.key.blue { color: var(--blue); } .key.orange { color: var(--orange); }
.key.red { color: var(--red); } .key.green { color: var(--green); }
.frame { display: grid; grid-template: 170px 22px / 46px minmax(0, 1fr);
  padding-right: 10px; }
.wide .frame { grid-template-rows: 320px 22px; }
.ys, .xs { position: relative; font-size: 12px; color: var(--muted); }
.ys span { position: absolute; right: 8px; transform: translateY(50%); line-height: 1;
  white-space: nowrap; }
.xs { grid-column: 2; }
.xs span { position: absolute; top: 7px; transform: translateX(-50%); line-height: 1;
  white-space: nowrap; }
.plot { position: relative; touch-action: pan-y; border-bottom: 1px solid var(--rule); }
svg { position: absolute; inset: 0; width: 100%; height: 100%;
  overflow: visible; clip-path: inset(0 -6px); }
path { fill: none; vector-effect: non-scaling-stroke; stroke-linejoin: round;
  stroke-linecap: round; }
path.grid { stroke: var(--grid); stroke-width: 1; }
path.blue { stroke: var(--blue); } path.orange { stroke: var(--orange); }
path.green { stroke: var(--green); } path.red { stroke: var(--red); }
path.muted { stroke: var(--muted); }
path.thin { stroke-width: 1; opacity: .32; } path.line { stroke-width: 1.8; }
path.band { stroke-width: 1; stroke-opacity: .3; fill-opacity: .22; }
path.band.blue { fill: var(--blue); } path.band.green { fill: var(--green); }
path.dots { stroke-width: 6.5; } path.dashed { stroke-width: 1.2; stroke-dasharray: 5 4; }
path.mark { stroke-width: 1.5; stroke-linecap: butt; }
.cursor { position: absolute; top: 0; bottom: 0; width: 1px; background: var(--muted);
  opacity: .5; pointer-events: none; }
.tip { position: absolute; top: 18px; padding: 5px 9px; border-radius: 6px; font-size: 12.5px;
  background: var(--ink); color: var(--paper); pointer-events: none; white-space: nowrap;
  line-height: 1.45; z-index: 1; }
.note { font-size: 12.5px; margin: 8px 0 0; }
.beyond { position: absolute; top: 0; right: 0; font-size: 12px; line-height: 1;
  color: var(--muted); }
.cards { columns: 300px; column-gap: 16px; }
.cards .card { break-inside: avoid; }
.cards .card + .card, .cards + .card, .card + .card { margin-top: 16px; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; }
td { overflow-wrap: anywhere; }
th, td { text-align: left; vertical-align: top; padding: 3px 0; font-weight: 400;
  border-top: 1px solid var(--grid); }
tr:first-child > * { border-top: 0; }
th { color: var(--muted); width: 1%; min-width: 120px; padding-right: 18px; white-space: nowrap; }
thead th { font-size: 12px; }
.ops td:first-child, .ops td:nth-child(2) { width: 1%; padding-right: 28px; white-space: nowrap; }
td.number { text-align: right; }
.scroll { overflow-x: auto; }
.sample { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 14px; line-height: 1.6;
  margin: 0; }
.sample b { font-weight: 600; color: var(--blue); }
.lines { font-size: 13px; margin: 0; overflow-wrap: anywhere; }
.stack { display: grid; gap: 12px; }
.stack .card { margin: 0; }
pre { font-size: 12.5px; overflow-x: auto; margin: 0; }
footer { margin-top: 48px; color: var(--muted); font-size: 13px; }
@media (max-width: 720px) {
  main { padding: 24px 14px 40px; } .charts { grid-template-columns: minmax(0, 1fr); }
  .wide .frame { grid-template-rows: 240px 22px; }
  .tile { flex-basis: 40%; } .tile.first b { font-size: 26px; }
  .card, .chart { padding: 12px 12px 10px; } .legend { margin-left: 0; width: 100%; } }
@media print { body { background: none; } .chart, .card { break-inside: avoid; } }
"""

SCRIPT = """
for (const plot of document.querySelectorAll(".plot")) {
  const data = JSON.parse(plot.dataset.points), [low, high] = data.range;
  const cursor = plot.querySelector(".cursor"), tip = plot.querySelector(".tip");
  const nearest = (xs, x) => {
    let first = 0, last = xs.length - 1;
    while (last - first > 1) {
      const middle = (first + last) >> 1;
      if (xs[middle] < x) first = middle; else last = middle;
    }
    return Math.abs(xs[last] - x) < Math.abs(xs[first] - x) ? last : first;
  };
  const hide = () => { cursor.hidden = tip.hidden = true; };
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    const at = low + (event.clientX - box.left) / box.width * (high - low);
    const main = data.series.find((one) => one.x.length);
    if (!main) return;
    const step = main.x[nearest(main.x, at)], lines = ["step " + step.toLocaleString("en")];
    for (const one of data.series) {
      if (!one.x.length) continue;
      const i = nearest(one.x, step);
      if (one.dots && Math.abs(one.x[i] - step) > (high - low) * 0.012) continue;
      const value = one.y[i] === null ? "not finite" : one.y[i].toLocaleString("en",
        { maximumSignificantDigits: 5 });
      lines.push(one.name + "  " + value + (one.y[i] === null ? "" : " " + data.unit));
    }
    tip.replaceChildren(...lines.map((text) => {
      const line = document.createElement("div");
      line.textContent = text;
      return line;
    }));
    const fraction = (step - low) / (high - low);
    cursor.style.left = 100 * fraction + "%";
    tip.style.left = fraction < 0.5 ? "calc(" + 100 * fraction + "% + 10px)" : "auto";
    tip.style.right = fraction < 0.5 ? "auto" : "calc(" + 100 * (1 - fraction) + "% + 10px)";
    cursor.hidden = tip.hidden = false;
  });
}
"""
