"""How much an answer suffers when tokens are dropped: methods x budgets x question kinds, through the exported graphs.

variants.py      which methods and parameters are compared, as one table
experimental.py  methods that are candidates, built from a relevance and a rest; the exporter does not know them
resolution.py    fewer tokens without selection: a smaller image, and average-pooled tokens
bundles.py       exported graphs, kept in the work folder
harness.py       the exam: scenes seen once, selection, prefill and decode in batches, milliseconds of selection
results.py       one file of answers per variant and budget; a run that was cut short goes on
measures.py      accuracy, share of kept patches, paired bootstrap
report.py        tables of docs/quality.md; plot.py: its picture
command.py       scripts/benchmark quality
"""
