"""Style and script of the HTML report."""

STYLE = """
:root { color-scheme: light dark; --ink: #202124; --soft: #5f6368; --line: #dadce0; --paper: #fff; --panel: #f6f7f9;
  --dense: #5f6368; --sparse: #1a73e8; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --soft: #9aa0a6; --line: #3c4043; --paper: #17181a;
  --panel: #202124; --dense: #9aa0a6; --sparse: #8ab4f8; --bad: #f2b8b5; } }
* { box-sizing: border-box; }
body { margin: 0; padding: 32px clamp(16px, 3vw, 56px) 64px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px; font-weight: 600; }
h2 { font-size: 18px; margin: 40px 0 12px; font-weight: 600; }
h3 { font-size: 15px; margin: 24px 0 8px; font-weight: 600; }
p { margin: 4px 0; } .soft { color: var(--soft); } .bad { color: var(--bad); }
code { font: 0.93em/1.4 ui-monospace, "DejaVu Sans Mono", monospace; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 24px 0 8px; }
.card { background: var(--panel); border-radius: 10px; padding: 14px 16px; }
.card b { display: block; font-size: 22px; line-height: 1.3; font-weight: 600; } .card span { color: var(--soft); }
figure { margin: 0; } figcaption { color: var(--soft); font-size: 13px; margin-top: 4px; }
.row { display: grid; gap: 16px; margin: 8px 0;
  grid-template-columns: repeat(auto-fit, minmax(min(220px, 100%), 1fr)); }
.row img, .row video { width: 100%; border-radius: 6px; display: block; image-rendering: pixelated; background: #000; }
.slider { position: relative; --cut: 50%; border-radius: 6px; overflow: hidden; }
.slider .over { position: absolute; inset: 0; clip-path: inset(0 calc(100% - var(--cut)) 0 0); }
.slider::after { content: ""; position: absolute; inset: 0 auto 0 calc(var(--cut) - 1px); width: 2px; background: #fff;
  box-shadow: 0 0 0 1px #0008; pointer-events: none; }
.slider input { position: absolute; inset: 0; width: 100%; height: 100%; margin: 0; opacity: 0; cursor: ew-resize; }
.slider:focus-within { outline: 2px solid var(--sparse); outline-offset: 2px; }
img.wide { max-width: 100%; border: 1px solid var(--line); border-radius: 6px; display: block; margin: 8px 0;
  background: #fff; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; width: 100%; }
th, td { text-align: left; padding: 6px 20px 6px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 500; } td:last-child, th:last-child { padding-right: 4px; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
svg { display: block; max-width: 100%; height: auto; margin: 8px 0; }
details { margin-top: 8px; } summary { cursor: pointer; color: var(--soft); }
"""

# Adds to each row a column in which the dense picture covers the sparse one up to where one drags. Everything is on the
# page without it; the pictures are copies of those that are there, so that the page does not grow.
SCRIPT = """
for (const row of document.querySelectorAll(".row")) {
  const [dense, sparse] = row.querySelectorAll("img, video");
  const make = (tag, values) => Object.assign(document.createElement(tag), values);
  const figure = make("figure"), box = make("div", { className: "slider" });
  const under = sparse.cloneNode(), over = dense.cloneNode();
  const range = make("input", { type: "range", min: 0, max: 100, step: 0.1, value: 50 });
  over.classList.add("over");
  range.setAttribute("aria-label", "how much of the dense one covers the sparse one");
  range.addEventListener("input", () => box.style.setProperty("--cut", range.value + "%"));
  for (const each of [under, over]) if (each.tagName === "VIDEO") Object.assign(each, { controls: false, muted: true });
  under.addEventListener("timeupdate", () => {
    if (Math.abs(over.currentTime - under.currentTime) > 0.05) over.currentTime = under.currentTime;
  });
  box.append(under, over, range);
  figure.append(box, make("figcaption", { textContent: "drag: dense on the left, sparse on the right" }));
  row.append(figure);
}
"""
