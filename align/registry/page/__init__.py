"""The registry for browsers: what `stage=registry stage.action=serve` serves. It reads, and changes nothing.

server      the app: which address answers with what
views       the table with its filters, one run, runs side by side, the aliases
lineage     a run's ancestors and descendants, drawn
templating  the templates in templates/
static/     the script that swaps views, the style
"""
