"""The annotation app in a browser; what it shares with other applications is in `align.web`.

server    what answers, and where            access      who may use the pages, and which requests they send
login     log in, accept an invitation       manage      the Gradio pages of those who run a project
routes    leases, votes, drafts as JSON      dashboard   what a project's votes say, for reviewers
markup    text of models and people as       templating  the templates in templates/, and the words of
          HTML that does nothing                         static/strings.json: every word of the interface
static/   the ranking widget's script, style sheets
"""
