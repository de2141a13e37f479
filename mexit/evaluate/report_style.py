"""The style sheet of the evaluation report: light and dark, and readable at the width of a phone."""

STYLE = """
:root{color-scheme:light dark;--paper:#fff;--raised:#f6f8fa;--ink:#1b1f24;--soft:#59636e;--line:#d8dee4;
--blue:31 111 180;--red:200 68 47;--on:#fff;--good:#1a7f37;--bad:#b3261e;--before:#8a8f98}
@media (prefers-color-scheme:dark){:root{--paper:#14171c;--raised:#1d2229;--ink:#e6e9ee;--soft:#9aa4b1;
--line:#343b45;--blue:92 160 230;--red:240 113 92;--on:#10141a;--good:#63c77a;--bad:#ff8d80;--before:#a2a8b2}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0 auto;padding:1.5rem clamp(.9rem,3vw,2.5rem) 4rem;max-width:76rem;background:var(--paper);
color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","DejaVu Sans",sans-serif}
h1{font-size:1.6rem;line-height:1.25;margin:.2rem 0 .3rem;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:2.6rem 0 .4rem;padding-top:.9rem;border-top:1px solid var(--line)}
h3{font-size:1rem;margin:1.4rem 0 .3rem}
p{margin:.3rem 0 .8rem;max-width:48rem}
.soft,figcaption .file{color:var(--soft)}
nav{display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;margin:1rem 0}
a{color:rgb(var(--blue))}
a:focus-visible,summary:focus-visible,[tabindex]:focus-visible{outline:2px solid rgb(var(--blue));outline-offset:2px}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(8.5rem,1fr));gap:.6rem;margin:1rem 0;padding:0}
.facts div{background:var(--raised);border-radius:.5rem;padding:.6rem .8rem}
.facts dt{color:var(--soft);font-size:.85rem}
.facts dd{margin:0;font-size:1.35rem;font-weight:600;overflow-wrap:anywhere}
.facts small{display:block;font-size:.8rem;font-weight:400;color:var(--soft)}
.words{margin:.6rem 0;max-width:48rem}
.words dt{font-weight:600}
.words dd{margin:0 0 .5rem 1rem}
.scroll{overflow-x:auto;max-width:100%;margin-bottom:1.2rem}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.28rem .7rem .28rem 0;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
thead th{color:var(--soft);font-weight:500;font-size:.85rem;vertical-align:bottom}
th.name,td.name{text-align:left;white-space:normal;overflow-wrap:anywhere;font-weight:400;min-width:7rem;
max-width:16rem}
.bar{display:block;position:relative;width:9rem;height:.9rem;margin-left:.3rem;background:var(--raised);
border-radius:.2rem}
.bar i{position:absolute;top:.3rem;height:.3rem;border-radius:.15rem;background:rgb(var(--blue)/.45);min-width:2px}
.bar b{position:absolute;top:.15rem;width:.6rem;height:.6rem;margin-left:-.3rem;border-radius:50%;
background:rgb(var(--blue))}
details{margin:.6rem 0}
summary{cursor:pointer;color:rgb(var(--blue));padding:.3rem 0}
.matrix th,.matrix td{border:1px solid var(--line);padding:0;text-align:center;font-size:.75rem;font-weight:400}
.matrix td{min-width:1.45rem;height:1.45rem;padding:0 .15rem}
.matrix tbody th{position:sticky;left:0;z-index:1;background:var(--paper);text-align:right;padding:0 .4rem;
max-width:11rem;overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
.matrix thead th{writing-mode:vertical-rl;text-orientation:sideways;
transform:rotate(180deg);text-align:left;padding:.3rem .1rem;
max-height:10rem;overflow:hidden;text-overflow:ellipsis;white-space:nowrap;vertical-align:top;color:var(--ink)}
.matrix thead .corner{writing-mode:horizontal-tb;transform:none;position:sticky;left:0;z-index:2;
background:var(--paper);vertical-align:bottom;text-align:right;color:var(--soft);padding:.3rem .4rem}
.matrix .c{background:rgb(var(--blue)/var(--v))}
.matrix .e{background:rgb(var(--red)/var(--v))}
.matrix.large td{min-width:2.3rem;height:2.1rem}
.matrix.large th,.matrix.large td{font-size:.85rem}
@media (prefers-color-scheme:light){.matrix .inverted-light{color:var(--on)}}
@media (prefers-color-scheme:dark){.matrix .inverted-dark{color:var(--on)}}
.beside{display:flex;flex-wrap:wrap;gap:.5rem 3rem;align-items:flex-start}
.beside>div{min-width:0;max-width:100%}
.beside h3{margin-top:.3rem}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(9.5rem,1fr));gap:1.1rem .9rem;padding:0;margin:0;
list-style:none}
.tiles figure{margin:0}
.tiles .frame{display:flex;align-items:center;justify-content:center;aspect-ratio:1;background:var(--raised);
border-radius:.4rem;overflow:hidden}
.tiles img{width:100%;height:100%;object-fit:contain}
.tiles img.small{image-rendering:pixelated}
.tiles figcaption{font-size:.85rem;line-height:1.35;margin-top:.35rem;overflow-wrap:anywhere}
.tiles figcaption span{display:block}
.right{color:var(--good)}
.wrong{color:var(--bad)}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(15rem,1fr));gap:1rem}
.charts figure{margin:0;max-width:24rem}
.charts svg{width:100%;height:auto;display:block}
svg text{fill:var(--soft);font-size:11px}
svg .axis{stroke:var(--line);fill:none}
svg .ideal{stroke:var(--soft);stroke-dasharray:2 3;fill:none}
svg .before{stroke:var(--before);fill:none;stroke-width:1.5}
svg .after{stroke:rgb(var(--blue));fill:none;stroke-width:2.2}
svg circle.before{fill:var(--before);stroke:none}
svg circle.after{fill:rgb(var(--blue));stroke:none}
.key{display:inline-block;width:1.6rem;height:.25rem;border-radius:.1rem;vertical-align:middle;margin-right:.3rem}
@media (max-width:30rem){body{font-size:15px}.tiles{grid-template-columns:repeat(2,1fr)}.bar{width:6.5rem}
td.name:first-child,th.name:first-child{position:sticky;left:0;background:var(--paper);min-width:8rem;max-width:8rem}
td.name:last-child{white-space:nowrap;max-width:none}.matrix tbody th{max-width:8.6rem}
.matrix.large td{min-width:1.6rem;height:1.6rem}.matrix.large th,.matrix.large td{font-size:.75rem}
.matrix thead .corner{white-space:normal}}
@media print{details:not([open])>*{display:none}}
"""
