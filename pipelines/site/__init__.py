"""The pages of the HTML report: templates, what stands in them, and how they point at one another."""
