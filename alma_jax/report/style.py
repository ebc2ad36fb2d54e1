"""The page's style sheet: system font, light and dark, and the colours of the charts."""

STYLE = """
:root{color-scheme:light dark;--ink:#1c2126;--quiet:#667079;--line:#dfe3e7;--page:#fff;--box:#f5f7f8;--alarm:#b3261e;
--c0:#0b69b0;--c1:#cf5a12;--c2:#14855f;--c3:#7a5ea8;--c4:#b8860b;--c5:#a9477f;--c6:#aab3bb}
@media(prefers-color-scheme:dark){:root{--ink:#e4e7ea;--quiet:#98a2ab;--line:#30363c;--page:#14171a;--box:#1d2125;
--alarm:#ff8a80;--c0:#5aaeea;--c1:#f0935a;--c2:#4cc39a;--c3:#b39ddb;--c4:#dcb450;--c5:#e08bbb;--c6:#6a747d}}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:62rem;margin:0 auto;padding:1.5rem 1rem 5rem}
h1{font-size:1.5rem;margin:0 0 .3rem}h2{font-size:1.15rem;margin:2.6rem 0 .7rem;padding-top:.6rem;
border-top:1px solid var(--line)}h3{font-size:.95rem;margin:1.5rem 0 .5rem;font-weight:600}
p{margin:.4rem 0;max-width:46rem}a{color:var(--c0)}
nav{display:flex;flex-wrap:wrap;gap:.2rem 1rem;margin-top:1rem;font-size:.9rem}
nav a{text-decoration:none}.quiet{color:var(--quiet);font-size:.87rem}.alarm{color:var(--alarm)}
.state{display:inline-block;padding:.05rem .55rem;border-radius:1rem;background:var(--box);border:1px solid var(--line)}
.state.finished{color:var(--c2)}.state.running{color:var(--c0)}.state.failed,.state.stopped{color:var(--alarm)}
svg{display:block;width:100%;height:auto;font-size:12px;margin:.4rem 0}svg text{fill:var(--ink)}
svg text.quiet{fill:var(--quiet);font-size:11.5px}svg .s0 text,svg .s1 text,svg .s2 text{fill:currentColor}
svg text.name{fill:currentColor;font-weight:600}svg text.inside{fill:var(--page);font-size:11.5px}
.end{text-anchor:end}.mid{text-anchor:middle}.grid line,line.grid{stroke:var(--line)}line.axis{stroke:var(--c6)}
.line{fill:none;stroke:currentColor;stroke-width:2;stroke-linejoin:round}.level{stroke:currentColor;stroke-width:1.3;
stroke-dasharray:5 4}.whisker{stroke:currentColor;stroke-width:1.3;opacity:.6}.dot,.fill{fill:currentColor}
.s0{color:var(--c0)}.s1{color:var(--c1)}.s2{color:var(--c2)}.s3{color:var(--c3)}.s4{color:var(--c4)}.s5{color:var(--c5)}
.s6{color:var(--c6)}h3 span{font-weight:600}
div.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(13.5rem,1fr));gap:.8rem 1.2rem}figure{margin:0}
figcaption{font-size:.8rem;color:var(--quiet);line-height:1.35}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.86rem;font-variant-numeric:tabular-nums;margin:.5rem 0}
th,td{padding:.22rem .75rem .22rem 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--line)}
th{font-weight:600;color:var(--quiet)}.n{text-align:right;padding:.22rem 0 .22rem .9rem}td.n{white-space:nowrap}
th:last-child,td:last-child{padding-right:2px}
details{margin:.4rem 0}summary{cursor:pointer}
pre{background:var(--box);padding:.6rem .8rem;border-radius:.4rem;overflow-x:auto;
font-size:.82rem;white-space:pre-wrap;margin:.3rem 0}pre.asked{border-left:3px solid var(--c0)}
article{margin:1rem 0 1.6rem}
"""
