"""One file a task: check the input, build the problem, choose and run a model, report.  Only here are degradations known."""

TASKS = {"deblur": "remove a known blur from a photograph with noise (non-blind deconvolution)"}
