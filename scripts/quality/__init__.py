"""How much an answer suffers when tokens are dropped: methods x budgets x question kinds, by flashvlm.evaluation.

variants.py    which methods and parameters are compared, as one table
resolution.py  fewer tokens without selection: a smaller image, and average-pooled tokens
bundles.py     a bundle for each variant, kept in the work folder
task.py        the questions, and which patches they ask for
runs.py        the variants answer; milliseconds of selection
measures.py    accuracy, share of kept patches, differences
report.py      tables of docs/quality-tables.md; plot.py: the picture of docs/quality.md
command.py     scripts/benchmark quality
"""
