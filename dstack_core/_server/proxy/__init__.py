"""The way to services: `/services/PROJECT/RUN/…` and `/models/PROJECT/…`, passed on to the replicas of a run.

    access      who may in, by token, by socket, or from a browser of this computer
    targets     from the path of a request to a service, and from a replica's answers back to paths of ours
    heads       heads of requests and answers, without what belongs to one connection alone
    upstream    one connection to a replica
    pools       the connections to each replica, and which replica is next
    asking      one replica after the other until one has answered
    app         HTTP
    splice      WebSockets and all else that upgrades: bytes in both directions
    models      the paths that OpenAI's clients know
    front       the port for browsers of a server that has only its unix socket
    refusing    what a client gets to read when there is no answer from a replica

A request is not touched by FastAPI, and an answer is not kept: what a replica sends goes on as it comes.
"""
