"""`latent-grpo report RUN`: one HTML file with everything in it, to read offline, to mail, to keep beside the run.

    run folder ──► curves.py   metrics, as charts with a sentence each ──┐
               ──► sample.py   whole groups of trajectories, compressed ─┼─► build.py ──► report.html
               ──► page/       HTML, CSS, JavaScript; Plotly's bundle ───┘

The page loads nothing (its content security policy forbids it) and treats every text of a model as hostile: texts
travel as compressed JSON and reach the page as text nodes only. Groups are unpacked when they are looked at, so the
number of trajectories does not slow the page's opening.
"""
