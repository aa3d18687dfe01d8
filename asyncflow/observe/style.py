"""The report's style sheet: one set of colour names with values for light and for dark backgrounds."""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fcfcfb; --ink: #1d2126; --muted: #666d76; --rule: #e4e6e8; --track: #eff1f2;
  --main: #2563b8; --second: #c26a12;
  --generate: #3b78cf; --score: #1f9c86; --train: #d9822b; --weights: #9160c4; --switch: #c2558f; --checkpoint: #7d8791;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15181c; --ink: #e7e9eb; --muted: #9aa2ab; --rule: #2c3137; --track: #1f2429;
    --main: #6ea8f2; --second: #eba352;
    --generate: #5b96e6; --score: #37b59d; --train: #e59a4c; --weights: #ab81db; --switch: #dd7fb0;
    --checkpoint: #8f99a3;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1020px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0; letter-spacing: -0.01em; }
h2 { font-size: 17px; margin: 44px 0 12px; padding-bottom: 6px; border-bottom: 1px solid var(--rule); }
p { margin: 6px 0; }
.muted, small { color: var(--muted); }
small { font-size: 13px; }
.tiles { display: flex; flex-wrap: wrap; gap: 12px 40px; margin-top: 24px; }
.tile { display: flex; flex-direction: column; }
.tile strong { font-size: 26px; font-weight: 600; line-height: 1.25; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(400px, 100%), 1fr)); gap: 24px 36px; }
figure { margin: 0; }
figcaption small { display: block; margin-bottom: 4px; }
figcaption span { margin-left: 14px; }
.wide { overflow-x: auto; }
.wide svg { min-width: 640px; }
svg.chart { display: block; width: 100%; height: auto; }
svg text { font: 11px system-ui, sans-serif; fill: var(--muted); }
svg text.service { font-size: 12px; fill: var(--ink); }
svg text.end { text-anchor: end; }
svg text.middle { text-anchor: middle; }
.grid { stroke: var(--rule); }
.track { fill: var(--track); }
.line { fill: none; stroke: var(--main); stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.line.faint { stroke-width: 1; opacity: 0.35; }
.line.second { stroke: var(--second); }
.dot { fill: var(--main); opacity: 0; }
.dot.second { fill: var(--second); }
.dot.shown, .dot:hover { opacity: 1; }
.bar:hover { opacity: 0.7; }
.bar.generate { fill: var(--generate); }
.bar.score { fill: var(--score); }
.bar.train { fill: var(--train); }
.bar.weights { fill: var(--weights); }
.bar.switch { fill: var(--switch); }
.bar.checkpoint { fill: var(--checkpoint); }
.bar.idle { fill: var(--muted); opacity: 0.55; }
.mark { stroke: var(--muted); stroke-dasharray: 2 3; }
.bound { stroke: var(--second); stroke-width: 2.5; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 20px; font-size: 13px; color: var(--muted); }
.key { display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin-right: 6px; }
.key.second { background: var(--second); }
.key.generate { background: var(--generate); }
.key.score { background: var(--score); }
.key.train { background: var(--train); }
.key.weights { background: var(--weights); }
.key.switch { background: var(--switch); }
.key.checkpoint { background: var(--checkpoint); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; font-size: 13px; color: var(--muted); }
th, td { padding: 4px 28px 4px 0; border-bottom: 1px solid var(--rule); }
.number { text-align: right; }
tfoot th, tfoot td { border-bottom: 0; font-weight: 600; color: var(--ink); }
details { margin: 10px 0; }
summary { cursor: pointer; }
.texts td { vertical-align: top; white-space: pre-wrap; overflow-wrap: anywhere; min-width: 9em; }
.texts .facts { color: var(--muted); font-size: 13px; white-space: pre; }
.texts .response { background: var(--track); }
pre { overflow-x: auto; padding: 14px 16px; background: var(--track); border-radius: 6px; font-size: 13px; }
"""
