"""Colours and type of the report page and of charts that stand alone: light, and dark where the reader's system is."""

from __future__ import annotations

#: arm -> (light, dark). Told apart by lightness too, not by hue alone; hf_paged has the strongest.
ARM_COLOURS = {
    "loop": ("#8b929c", "#8f98a3"),
    "padded": ("#c9821f", "#e0a045"),
    "padded_budget": ("#8a4b14", "#b9793f"),
    "generate_batch": ("#7a5bd0", "#a48ff0"),
    "hf_paged": ("#00796b", "#2cc7b0"),
    "hf_paged_loop": ("#4a90c2", "#6db6e8"),
}
OTHER_COLOUR = ("#555555", "#bbbbbb")
_DASHES = {"padded": "7 4", "padded_budget": "2 3", "generate_batch": "10 3 2 3", "hf_paged_loop": "4 2"}
_INK = {
    "--ink": ("#1b1f24", "#e8eaed"),
    "--muted": ("#5f6873", "#9aa4af"),
    "--paper": ("#ffffff", "#14171a"),
    "--card": ("#f6f7f8", "#1c2024"),
    "--rule": ("#dfe3e7", "#30363c"),
    "--bad": ("#b3261e", "#ff8a80"),
    "--good": ("#00695c", "#4fd8c4"),
}
_CHART = """
svg{font:13px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;max-width:100%;height:auto;display:block}
.label,.value,.heading{fill:var(--ink)}.heading{font-weight:600}.tick,.axis,.muted{fill:var(--muted)}.tick{font-size:12px}.axis{font-size:12px}
.value{font-variant-numeric:tabular-nums}.grid{stroke:var(--rule);fill:none}
.line{fill:none;stroke-width:2;stroke-linejoin:round}.whisker{stroke:var(--ink);stroke-width:1.5;opacity:.55}
"""
_PAGE = """
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink)}
body{font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1320px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:26px;margin:0 0 4px;letter-spacing:-.01em}
h2{font-size:20px;margin:40px 0 4px}h3{font-size:15px;margin:22px 0 6px}
p{margin:4px 0 10px;max-width:80ch}.sub{color:var(--muted)}.note{color:var(--muted);font-size:13px;margin:3px 0}
.card{background:var(--card);border:1px solid var(--rule);border-radius:8px;padding:14px 16px}
.grid2{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(440px,100%),1fr));gap:16px;align-items:start}
.card h3{margin:0 0 8px}.wide{grid-column:1/-1}.wide svg{max-width:640px}.card .note{margin:8px 0 0}
.scroll{overflow-x:auto;margin:10px 0}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;width:100%}
th,td{padding:5px 10px;border-bottom:1px solid var(--rule);text-align:right;white-space:nowrap}
th{font-weight:600;font-size:13px;color:var(--muted);vertical-align:bottom}th:first-child,td:first-child{text-align:left}
tr.ours td{font-weight:600}td.text,th.text{text-align:left;white-space:normal;overflow-wrap:anywhere}
.dense th,.dense td{padding:4px 6px;font-size:12.5px}
td small{color:var(--muted);font-weight:400}
.loss{color:var(--bad);font-weight:600}.win{color:var(--good);font-weight:600}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;margin:8px 0;font-size:13px}
.legend span{display:inline-flex;align-items:center;gap:6px}
.legend svg{width:26px;height:10px}
details{margin:12px 0}summary{cursor:pointer;font-weight:600}code{font:13px ui-monospace,Menlo,Consolas,monospace}
.headline{font-size:17px;margin:14px 0 18px}
@media print{details{display:block}}
"""


def chart_style() -> str:
    """The style of a chart that stands alone: it follows the reader's light or dark setting."""
    return _variables() + _CHART + _arms()


def page_style() -> str:
    """The style of the page, charts included."""
    return chart_style() + _PAGE


def _variables() -> str:
    named = _INK | {f"--{arm}": colours for arm, colours in (ARM_COLOURS | {"other": OTHER_COLOUR}).items()}
    light, dark = ("".join(f"{name}:{pair[k]};" for name, pair in named.items()) for k in (0, 1))
    return f":root{{color-scheme:light dark;{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}"


def _arms() -> str:
    rules = []
    for arm in (*ARM_COLOURS, "other"):
        dash = f".line.{arm}{{stroke-dasharray:{_DASHES[arm]}}}" if arm in _DASHES else ""
        rules.append(f"rect.{arm},.dot.{arm}{{fill:var(--{arm})}}.line.{arm}{{stroke:var(--{arm})}}{dash}")
    return "".join(rules) + ".line.hf_paged{stroke-width:2.8}"


def style_of(arm: str) -> str:
    """The class of an arm's marks."""
    return arm if arm in ARM_COLOURS else "other"
