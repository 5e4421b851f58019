"""The command `latent-grpo report RUN`, which writes one self-contained HTML file to read offline or to mail.

    run folder ──► curves.py   metrics, as charts with a sentence each ──┐
               ──► sample.py   whole groups of trajectories, compressed ─┼─► build.py ──► report.html
               ──► page/       HTML, CSS, JavaScript; Plotly's bundle ───┘

The page loads nothing (its content security policy forbids it) and treats every text of a model as hostile: texts
travel as compressed JSON and reach the page as text nodes only. Groups are unpacked when they are shown, so the number
of trajectories does not slow the page's opening.
"""
