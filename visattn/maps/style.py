"""Style and script of a page of maps."""

STYLE = """
:root { color-scheme: light dark; --ink: #202124; --soft: #5f6368; --line: #dadce0; --paper: #fff; --panel: #f6f7f9; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --soft: #9aa0a6; --line: #3c4043; --paper: #17181a;
  --panel: #202124; } }
* { box-sizing: border-box; }
body { margin: 0; padding: 28px clamp(16px, 3vw, 56px) 64px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px; font-weight: 600; }
h2 { font-size: 18px; margin: 36px 0 8px; font-weight: 600; }
h4 { font-size: 14px; margin: 12px 0 4px; font-weight: 600; }
p { margin: 4px 0; } .soft { color: var(--soft); }
code { font: 0.92em/1.4 ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
.columns { display: grid; gap: 24px; grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)); }
.columns > * { min-width: 0; }
.four { grid-template-columns: repeat(2, minmax(0, 1fr)); }
@media (max-width: 800px) { .four { grid-template-columns: minmax(0, 1fr); } }
@media (min-width: 1900px) { .four { grid-template-columns: repeat(4, minmax(0, 1fr)); } }
figure { margin: 0; } figcaption { color: var(--soft); font-size: 13px; }
.heads { display: grid; gap: 6px; grid-template-columns: repeat(auto-fit, minmax(76px, 1fr)); }
.heads figure { max-width: 180px; }
.heads img { width: 100%; display: block; image-rendering: pixelated; border-radius: 3px; background: #fff; }
.heads .on img { outline: 3px solid #d55e00; }
.picture { width: 100%; max-width: 420px; display: block; border-radius: 6px; image-rendering: pixelated; }
details { border-top: 1px solid var(--line); padding: 8px 0; } summary { cursor: pointer; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; width: 100%; }
th, td { text-align: left; padding: 4px 14px 4px 0; border-bottom: 1px solid var(--line); vertical-align: middle; }
th code { white-space: nowrap; }
th { color: var(--soft); font-weight: 500; vertical-align: bottom; }
td.bears { min-width: 260px; }
td svg { display: block; min-width: 70px; }
.scale { display: inline-block; width: 120px; height: 12px; border-radius: 3px; vertical-align: middle; margin: 0 6px; }
"""

# Without it every layer is open; with it a click on a head opens its layer and marks it.
SCRIPT = """
for (const layer of document.querySelectorAll("details.layer")) layer.open = false;
const show = (id, head) => {
  const layer = document.getElementById(id);
  if (!layer) return;
  layer.open = true;
  for (const each of document.querySelectorAll(".heads .on")) each.classList.remove("on");
  if (head !== null) for (const each of layer.querySelectorAll(`[data-head="${head}"]`)) each.classList.add("on");
};
for (const link of document.querySelectorAll("a[href^='#layer-']")) link.addEventListener("click",
  () => show(link.getAttribute("href").slice(1), link.dataset.head ?? null));
if (location.hash) show(location.hash.slice(1), null);
"""
