"""The registry for browsers: what `stage=registry stage.action=serve` serves. It reads, and changes nothing.

server    the app: which address answers with what    runs      the table with its filters
run       one run: its lineage, its report            compare   runs side by side
aliases   what they mean, and their history           lineage   a run's ancestors and descendants, drawn
templating  the templates in templates/               static/   the script that swaps views, the style
"""
