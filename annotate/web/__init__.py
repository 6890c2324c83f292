"""The annotation app in a browser.

server   who may come in, and what answers      markup   text of models and people as HTML that does nothing
routes   leases, votes, drafts as JSON          page     the Gradio page
cards    an item as the page shows it, and what the page says of it as a judgement
static/  the ranking widget: one script, one style sheet; strings.json: every word of the interface
"""
