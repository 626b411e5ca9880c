"""An OpenAI-compatible server. A request makes its way through these modules once, downwards:

    connections       how many there may be, and how long they may wait
    gate              the names of this server, an id for every request, its failures
    server            the routes
    admission         the token, a place among the requests under way, the JSON; `uploads` receives
    protocol          checks the JSON; `conversation` joins a message's parts to one text
    prompt_reader     renders and checks the prompt
    image_fetching    reads the images: data URLs, and public http(s) URLs where allowed
    engine            a queue and batches; `model_runner` runs the model, `decoding` draws tokens

The answer is JSON from `responses`. `web` adds a page, `metrics` the counts.
"""
