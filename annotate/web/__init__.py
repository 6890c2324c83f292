"""The annotation app in the browser. Parts that it shares with other applications are in `align.web`.

server    the app with all its routes        access      authentication, and checks of requests
login     log in, accept an invitation       manage      the Gradio pages of reviewers and admins
routes    leases, votes, drafts as JSON      dashboard   a project's figures, for reviewers
markup    texts of models and people as      templating  the templates in templates/, and the texts of
          harmless HTML                                  the interface in static/strings.json
static/   the ranking page's scripts, style sheets
"""
