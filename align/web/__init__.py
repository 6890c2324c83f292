"""Parts that every web application here shares; they know none of them.

auth         authentication: every request passes it         credentials  names, passwords, tokens, session cookies
server       the port, how many connections are held,        throttle     how often a visitor may try, and who is
             and how long the server waits for each                       served next if only few can be
key_link     one person, by a link                           errors       errors as JSON
gradio_pages what pages that Gradio draws share
"""
