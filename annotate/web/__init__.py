"""The annotation app in a browser.

server    what answers, and where            gate      who may come in: every request passes it
connections  how many are held, and for how long the server waits for what a client owes
entrance  log in, accept an invitation       queues     which queue a request is for
routes    leases, votes, drafts as JSON      page      the annotators' Gradio page
cards     an item as the page shows it       manage    the Gradio pages of those who run a project
markup    text of models and people as HTML   dashboard what a project's votes say, for reviewers
          that does nothing
static/   the ranking widget's script, style sheets; strings.json: every word of the interface
"""
