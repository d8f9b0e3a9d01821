"""What the notebooks conclude from their runs: one module a notebook, of functions from runs to table rows and summaries."""
