"""What purification does to one merge, as numbers (`report.json`), figures and a page.

`measure` computes the numbers of one weight, `merge` and `survey` find the weights, `build` makes
the `facts` that `figures` and `page` show.
"""

