"""Measures which blocks of a model may be skipped; docs/selection.md says how to use it.

selectors    the measurement, by generation or by loss
subjects     subjects to personalise to, and the model tuned to each
replay       losses with blocks skipped or masked
masking      hides the text from the image in some blocks
embedding    embeds pictures to compare them
inner_runs   splits that also skip a run between trained blocks
"""
