"""Parts that all web applications of this project share: authentication, errors, rate limits and the server. They
import none of the applications.

auth          the authentication middleware, which every request passes
credentials   names, passwords, tokens and session cookies
errors        errors as JSON
gradio_pages  settings that all Gradio pages share
key_link      one visitor, authenticated by a link
server        the port, the limit on connections, and deadlines of requests
throttle      waits after failed attempts, and a fair queue
"""
