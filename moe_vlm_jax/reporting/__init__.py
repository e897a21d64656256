"""Several evaluated models side by side: `python -m moe_vlm_jax.report`.

folders.py, workdirs.py     what was given -> evaluations.py, the one structure that everything else reads
published.py, .json         figures of others, and whether their printed averages follow from their cells
tables.py                   models x columns, averages, details, answers; layout.py is a table without a format
intervals.py                paired bootstrap of the difference of two models
cases.py                    questions with every model's answer
markdown.py, page.py        the two files that come out
"""
