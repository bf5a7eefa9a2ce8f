"""The page's style sheet: light and dark by the reader's setting, one column on a phone."""

CSS = """
:root {
  color-scheme: light dark;
  --page: #f7f4ef; --card: #ffffff; --ink: #1f1b16; --soft: #5c554b; --line: #e2dbd0; --track: #ece6dc;
  --accent: #a63f0b; --good: #14703f; --bad: #b1281c; --even: #735400; --mute: #655f57;
  --good-bg: #e2f2e8; --bad-bg: #fbe6e2; --even-bg: #f7edd2; --mute-bg: #ece8e2;
  --s0: #b8460c; --s1: #1b66a8; --s2: #0f7a58; --s3: #7442bd; --s4: #8a6a00; --s5: #b02a6b;
  --heat: 20 112 63; --shadow: 0 1px 2px rgb(60 40 20 / .07), 0 4px 16px rgb(60 40 20 / .05);
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #131518; --card: #1b1e22; --ink: #ece7df; --soft: #aea69b; --line: #32363c; --track: #2a2e34;
    --accent: #ff9d66; --good: #5fd39a; --bad: #ff9388; --even: #e6bd55; --mute: #aaa49b;
    --good-bg: #17342a; --bad-bg: #41211e; --even-bg: #382f17; --mute-bg: #2a2d31;
    --s0: #ff9d66; --s1: #6db5fa; --s2: #4fd0a2; --s3: #b99bff; --s4: #dfbb4d; --s5: #f58fbe;
    --heat: 60 170 115; --shadow: none;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  font-variant-numeric: tabular-nums;
}
a { color: var(--accent); }
a:focus-visible, summary:focus-visible, .scroll:focus-visible { outline: 2px solid var(--accent);
  outline-offset: 2px; }
.skip { position: absolute; left: -99em; }
.skip:focus { left: 1em; top: 1em; background: var(--card); padding: .5em 1em; z-index: 2; }
header, main, footer { max-width: 1180px; margin: 0 auto; padding: 0 28px; }
header { padding-top: 44px; }
.eyebrow { margin: 0; color: var(--accent); font-weight: 600; font-size: .9rem; }
h1 { font-size: clamp(1.75rem, 1.2rem + 2.4vw, 2.7rem); line-height: 1.15; margin: .25em 0 .4em;
  letter-spacing: -.02em; }
h1, h2, h3 { text-wrap: balance; }
h2 { font-size: 1.55rem; line-height: 1.2; letter-spacing: -.01em; margin: 0 0 .5em; }
h3 { font-size: 1.08rem; margin: 2em 0 .6em; }
h2 small { display: block; font-size: .85rem; font-weight: 500; letter-spacing: 0; color: var(--accent); }
.lede { font-size: 1.08rem; color: var(--soft); max-width: 46em; margin: 0 0 1.4em; }
p { max-width: 46em; overflow-wrap: anywhere; }
.note, .soft { color: var(--soft); font-size: .88rem; margin: .5em 0 0; }
nav { display: flex; flex-wrap: wrap; gap: .3em 1.2em; padding: .9em 0 0; font-size: .93rem; }
section { margin: 30px 0; padding: 28px; background: var(--card); border: 1px solid var(--line);
  border-radius: 14px; box-shadow: var(--shadow); }
dl.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(225px, 1fr)); gap: 1px; margin: 0;
  background: var(--card); border: 1px solid var(--line); border-radius: 12px; overflow: hidden; }
dl.facts div { box-shadow: 0 0 0 1px var(--line); padding: 11px 16px; }
dl.facts dt { color: var(--soft); font-size: .8rem; }
dl.facts dd { margin: 0; font-weight: 600; overflow-wrap: anywhere; }
.notice { border-left: 4px solid var(--even); background: var(--even-bg); padding: 12px 18px;
  border-radius: 0 10px 10px 0;
  margin: 1.2em 0 0; }
.notice h2 { font-size: 1rem; margin: 0 0 .2em; }
.notice ul { margin: 0; padding-left: 1.2em; }
.tiles { display: grid; grid-template-columns: repeat(4, 1fr); gap: 12px; list-style: none; padding: 0; margin: 0; }
.tiles li { border-radius: 10px; padding: 12px 16px; }
.tiles b { display: block; font-size: 2rem; line-height: 1.15; }
.tiles strong { display: block; }
.tiles span { font-size: .82rem; color: var(--soft); line-height: 1.35; display: block; }
.verdict { display: inline-flex; align-items: center; gap: .4em; white-space: nowrap; font-weight: 600;
  font-size: .84rem; }
.verdict i { font-style: normal; display: inline-grid; place-items: center; width: 1.35em; height: 1.35em;
  border-radius: 50%; font-weight: 700; }
.improved { --tone: var(--good); --tint: var(--good-bg); } .worse { --tone: var(--bad); --tint: var(--bad-bg); }
.no-difference { --tone: var(--even); --tint: var(--even-bg); }
.no-signal { --tone: var(--mute); --tint: var(--mute-bg); }
.verdict, .tiles b, .tiles strong { color: var(--tone); }
.verdict i, .tiles li { background: var(--tint); }
.gates { list-style: none; margin: 1.4em 0 0; padding: 0; }
.gates > li { padding: .7em 0; border-top: 1px solid var(--line); }
.gates ul { margin: .3em 0 0; padding-left: 1.3em; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; }
caption { text-align: left; font-weight: 600; padding: 0 0 .5em; caption-side: top; }
caption span { display: inline-block; position: sticky; left: 0; max-width: min(100%, calc(100vw - 52px)); }
th, td { text-align: left; padding: 6px 10px 6px 0; vertical-align: middle; }
thead th { color: var(--soft); font-weight: 500; font-size: .8rem; border-bottom: 1px solid var(--line);
  line-height: 1.25;
  vertical-align: bottom; }
tbody th { font-weight: 500; }
tbody tr + tr > * { border-top: 1px solid var(--line); }
td.n, th.n { text-align: right; white-space: nowrap; padding-right: 14px; }
td:last-child.n, th:last-child.n { padding-right: 0; }
.wrap td.n { white-space: normal; }
@media (min-width: 761px) { .forest-row .zero { transform: scaleY(1.9); transform-origin: 0 13px; } }
table + h4, .block { margin-top: 26px; }
.forest .draw { width: 22%; min-width: 190px; padding-left: 4px; }
.forest tfoot td { padding: 0 10px 0 0; }
.grid2 { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 26px 36px; }
figure { margin: 0; } .grid2 > .block { margin-top: 0; }
figcaption { font-weight: 600; font-size: .95rem; margin-bottom: .35em; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .2em 1.2em; margin: .2em 0 0; padding: 0;
  font-size: .85rem; }
.legend li { display: inline-flex; align-items: center; gap: .5em; }
svg { display: block; overflow: visible; }
svg text { fill: var(--soft); font-size: 11.5px; font-family: inherit; }
.grid { stroke: var(--line); stroke-width: 1; } .zero { stroke: var(--soft); stroke-width: 1.4; }
.line { fill: none; stroke: var(--c); stroke-width: 2.2; vector-effect: non-scaling-stroke; stroke-linejoin: round;
  stroke-linecap: round; }
.line.thin { stroke-width: 1; opacity: .5; }
.dot { fill: var(--card); stroke: var(--c); stroke-width: 2.2; }
.s0 { --c: var(--s0); } .s1 { --c: var(--s1); } .s2 { --c: var(--s2); } .s3 { --c: var(--s3); }
.s4 { --c: var(--s4); }
.s5 { --c: var(--s5); }
.line.s1 { stroke-dasharray: 8 4; } .line.s2 { stroke-dasharray: 2 4; } .line.s3 { stroke-dasharray: 10 3 2 3; }
.line.s4 { stroke-dasharray: 14 4; } .line.s5 { stroke-dasharray: 7 5 1 5 1 5; }
.line.rule { --c: var(--bad); stroke-dasharray: 3 3; stroke-width: 1.6; }
.track { fill: var(--track); } .fill { fill: var(--c); }
.mark line { stroke: var(--tone); stroke-width: 2.4; } .mark circle { fill: var(--tone); }
.mark.no-difference circle, .mark.no-signal circle { fill: var(--card); stroke: var(--tone); stroke-width: 2.2; }
.mark.no-signal line { stroke-dasharray: 4 3; }
.stacked rect.p0 { fill: var(--s1); } .stacked rect.p1 { fill: var(--s0); } .stacked rect.p2 { fill: var(--s2); }
.stacked rect.p3 { fill: var(--s3); } .stacked text { fill: var(--card); font-weight: 600; }
.heat { width: auto; min-width: 100%; } .heat tr > th:first-child { padding-left: 0; }
.heat th, .heat td { padding: 2px 8px; border: 0; }
.heat td { text-align: right; background: rgb(var(--heat) / calc(var(--v, 0) * .5)); min-width: 3.4em; }
.heat tbody tr + tr > * { border-top: 2px solid var(--card); }
.heat tr.first > * { border-top: 8px solid var(--card) !important; }
.heat tbody th { padding-left: 0; font-weight: 400; }
.heat th[scope=rowgroup] { vertical-align: top; font-weight: 600; }
.heat thead th + th + th { text-align: right; } .heat .none { background: none; color: var(--soft); }
.box rect { fill: var(--card); stroke: var(--soft); stroke-width: 1; }
.box.lead rect { stroke: var(--accent); stroke-width: 2.5; }
.box .name { fill: var(--ink); font-weight: 600; font-size: 12.5px; } .box .sub { font-size: 11px; }
.edge { stroke: var(--soft); stroke-width: 1.4; opacity: .7; } .edge.base { stroke-dasharray: 4 4; }
.lineage { max-width: 760px; margin: .4em auto 1em; }
.talk { list-style: none; margin: 0; padding: 0; display: grid; gap: 14px 22px;
  align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 310px), 1fr)); }
.talk li { border: 1px solid var(--line); border-radius: 12px; padding: 14px 16px; }
.talk .who { font-size: .82rem; color: var(--soft); margin: 0 0 .5em; display: flex; justify-content: space-between;
  gap: 1em; }
.bubble { border-radius: 10px; padding: 8px 12px; margin: 0 0 8px; overflow-wrap: anywhere; white-space: pre-wrap; }
.asked { background: var(--track); margin-right: 2em; } .said { background: var(--tint); margin-left: 2em; }
.bubble small { display: block; color: var(--soft); font-size: .75rem; white-space: normal; }
.thought { margin: 0 2em 8px 1em; padding: 2px 0 2px 12px; border-left: 3px solid var(--line); color: var(--soft); }
.thought small { font-size: .75rem; } .thought ul { list-style: none; margin: 0; padding: 0; }
.thought li { display: flex; gap: .7em; align-items: baseline; border: 0; border-radius: 0; padding: 1px 0;
  font-size: .86rem; }
.thought em { flex: 0 0 4.2em; font-style: normal; font-weight: 500; font-size: .75rem; color: var(--accent); }
.thought span { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere;
  min-width: 0; }
.judged { border-left: 4px solid var(--tone); background: var(--tint); border-radius: 0 10px 10px 0;
  padding: 12px 18px; margin: 1.6em 0 0; }
.judged p { margin: 0; font-weight: 600; color: var(--tone); display: flex; gap: .6em; align-items: baseline;
  max-width: none; }
.judged p i { font-style: normal; font-weight: 700; }
.judged ul { list-style: none; margin: .6em 0 0; padding: 0; font-size: .9rem; }
.judged li { display: flex; gap: .8em; align-items: baseline; padding: 3px 0; }
.judged .verdict i { background: none; } .judged li .verdict { flex: 0 0 7em; }
.judged li > span:last-child { overflow-wrap: anywhere; min-width: 0; }
.span line { stroke: var(--ink); stroke-width: 2; }
.controls th small, .measures th small { display: block; font-weight: 400; color: var(--soft); line-height: 1.3; }
.controls .draw { width: 32%; } .controls .fill { opacity: .65; } .alone { max-width: 620px; }
.terms { margin: 0; font-size: .88rem; color: var(--soft); display: grid; gap: .45em; align-content: start; }
.terms dt { display: inline; font-weight: 600; color: var(--ink); } .terms dt::after { content: ": "; }
.terms dd { display: inline; margin: 0; }
.tiles.plain { margin-top: 14px; } .tiles.plain li { --tone: var(--ink); --tint: var(--track); }
.measures .lead > * { font-weight: 600; } .measures .lead > th { color: var(--accent); }
.measures .draw { width: 40%; }
.roomy { max-width: 760px; }
.smalls { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(46%, 200px), 1fr)); gap: 14px 22px;
  margin-top: .8em; }
.small figcaption { font-size: .86rem; font-weight: 500; margin: 0; } .small .line { stroke-width: 1.8; }
.small .dot { stroke-width: 1.8; }
.spot line { stroke: var(--c); stroke-width: 1.8; } .spot circle { fill: var(--c); }
.spots text { paint-order: stroke; stroke: var(--card); stroke-width: 3px; } .spot text { fill: var(--ink); }
code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: .86em; }
pre { background: var(--track); padding: 12px 16px; border-radius: 10px; overflow-x: auto; margin: .6em 0; }
code { overflow-wrap: anywhere; } td.hash { white-space: nowrap; }
.wide { width: 46%; }
details { margin: .8em 0 0; } summary { cursor: pointer; color: var(--accent); }
footer { color: var(--soft); font-size: .85rem; padding-bottom: 40px; }
@media (max-width: 760px) {
  header, main, footer { padding-left: 16px; padding-right: 16px; } header { padding-top: 26px; }
  section { padding: 20px 16px; margin: 18px -8px; border-radius: 12px; }
  .tiles { grid-template-columns: 1fr 1fr; } dl.facts { grid-template-columns: 1fr 1fr; }
  dl.facts div { padding: 9px 12px; }
  .forest, .forest tbody, .forest tr, .forest tfoot, .forest caption { display: block; }
  .block { position: relative; }
  .forest thead { display: block; position: absolute; width: 1px; height: 1px; overflow: hidden;
    clip-path: inset(50%); }
  .forest tbody tr { display: flex; flex-wrap: wrap; align-items: baseline; gap: 0 1em; padding: 10px 0 6px;
    border-top: 1px solid var(--line); }
  .forest tr > * { border: 0 !important; padding: 0; } .forest tbody th { flex: 1 0 100%; }
  .forest td.draw { flex: 1 0 100%; width: 100%; padding: 2px 0; }
  .forest td.n { text-align: left; font-size: .86rem; }
  .forest .draw { min-width: 0; }
  .forest td.verd { width: auto; } .forest td[data-name]::before { content: attr(data-name) " "; color: var(--soft); }
  .forest tfoot td { display: none; } .forest tfoot td.draw { display: block; padding: 0; }
  .heat th, .heat td { padding: 2px 5px; } .heat td { min-width: 2.6em; } .heat { font-size: .84rem; }
  .heat thead th { font-size: .78rem; } .heat thead th + th { writing-mode: vertical-rl; transform: rotate(180deg); }
  .heat thead th + th + th { text-align: left; }
  .heat thead th + th { padding: 4px 5px; border: 0; line-height: 1.1; }
  pre { white-space: pre-wrap; } td.n, th.n { padding-right: 9px; }
  .thought { margin-left: .4em; margin-right: .4em; } .judged li { flex-direction: column; gap: 0; }
  .judged li .verdict { flex: none; } .controls .empty { display: none; }
  .measures .empty { display: none; }
  .asked { margin-right: 1em; } .said { margin-left: 1em; }
}
@media print { body { background: #fff; } section { box-shadow: none; break-inside: avoid-page; }
nav { display: none; } }
"""
