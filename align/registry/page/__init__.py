"""The registry for browsers, served by `stage=registry stage.action=serve`. It reads and changes nothing.

server      the app and its routes
views       the table with its filters, one run, runs side by side, the aliases
lineage     the picture of a run's ancestors and descendants
templating  the templates in templates/
static/     the script that swaps views, and the style
"""
