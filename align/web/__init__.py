"""What every web application here shares; it knows none of them.

auth         authentication: every request passes it         credentials  names, passwords, tokens, session cookies
connections  how many are held, and for how long the         throttle     how often somebody may try
             server waits for what a client owes it          fair_queue   who is served next where few can be
listening    the port, and the server that serves on it      errors       errors as JSON
key_link     one person, by a link                           gradio_pages what pages that Gradio draws share
"""
