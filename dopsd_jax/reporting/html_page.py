"""The frame of every page: one HTML file with its own style."""

import html


def render(title: str, body: str, *, style: str = "", script: str = "") -> str:
    """A whole page. title: plain text. body: HTML. style, script: added to what all pages have."""
    end = f"<script>{script}</script>\n" if script else ""
    page = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>{STYLE}{style}</style>
</head>
<body>
<h1>{html.escape(title)}</h1>
{body}
{end}</body>
</html>
"""
    # Prompts may hold halves of surrogate pairs, which no file can.
    return page.encode("utf-8", "replace").decode()


STYLE = """
:root { color-scheme: light dark; --back: #fff; --ink: #1c1c1e; --faint: #63636b; --line: #dcdce1;
  --accent: #2563c9; --card: #f6f6f8; --series: 42%; }
@media (prefers-color-scheme: dark) { :root { --back: #141416; --ink: #e9e9ec; --faint: #a0a0aa;
  --line: #36363c; --accent: #74a7ff; --card: #1d1d21;
  --series: 62%; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1240px; padding: 1.5rem; background: var(--back);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .8rem; }
h3 { font-size: 1rem; margin: 1rem 0 .4rem; }
dl { display: flex; flex-wrap: wrap; gap: .6rem 2.2rem; margin: 0; }
dt, .remark, .legend { color: var(--faint); font-size: .85rem; }
dd { margin: 0; font-size: 1.15rem; font-variant-numeric: tabular-nums; }
.verdict { font-size: 1.1rem; max-width: 60rem; }
#curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 380px), 1fr));
  gap: 1rem; }
figure { margin: 0; padding: .8rem; background: var(--card); border-radius: 8px; min-width: 0; }
figcaption { font-size: .9rem; color: var(--faint); }
figcaption b { color: var(--ink); }
svg { display: block; width: 100%; height: auto; }
svg text { font-size: 11.5px; fill: var(--faint); font-variant-numeric: tabular-nums; }
svg .y { text-anchor: end; } svg .x { text-anchor: middle; }
svg .grid { stroke: var(--line); } svg .axis { stroke: var(--faint); }
svg polyline { fill: none; stroke: currentColor; stroke-width: 1.8; stroke-linejoin: round; }
svg polygon { fill: currentColor; opacity: .22; } svg circle { fill: currentColor; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem .9rem; margin: .2rem 0 0; }
.legend i { display: inline-block; width: .8em; height: .8em; border-radius: 2px;
  margin-right: .35em; vertical-align: -.05em; }
.remark { margin: .3rem 0 0; }
#pick { display: flex; align-items: center; gap: .8rem; position: sticky; top: 0; z-index: 1;
  background: var(--back); padding: .5rem 0; } #pick[hidden] { display: none; }
#pick:not([hidden]) + #rounds h3 { display: none; }
#pick input { flex: 1; } #pick output { min-width: 5ch; font-variant-numeric: tabular-nums; }
img { max-width: 100%; height: auto; border-radius: 6px; display: block; }
details { margin: .5rem 0; } summary { cursor: pointer; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; margin: .4rem 0 1rem; }
th, td { text-align: left; font-weight: normal; padding: .18rem .6rem .18rem 0; vertical-align: top;
  border-bottom: 1px solid var(--line); }
th { color: var(--faint); white-space: nowrap; width: 1%; }
td { font-family: ui-monospace, monospace; overflow-wrap: anywhere; }
"""
