"""The annotation app in a browser; what it shares with other applications is in `align.web`.

server    what answers, and where            access    who may use the pages, and which requests they send
login     log in, accept an invitation       queues    which queue a request is for
routes    leases, votes, drafts as JSON      page      the annotators' Gradio page
item_view an item as the page shows it       manage    the Gradio pages of those who run a project
markup    text of models and people as HTML   dashboard what a project's votes say, for reviewers
          that does nothing                  templating the templates in templates/
static/   the ranking widget's script, style sheets; strings.json: every word of the interface
"""
