"""The program that runs one job on one machine, keeps its output, and answers the server. Imported by nobody.

Standard library only, Python 3.8 and later. The server packs these files into one archive and starts it with the
machine's own interpreter, so nothing here may be assumed to be installed there.

One thread and one loop: there are no locks, and no thread that a slow disk could leave waiting with one held.

    __main__    lock, session, the two processes (watchdog and agent)
    loop        readiness, timers, ends of children
    server      HTTP/1.1 over the unix socket
    api         the routes
    job         what the job is doing and why it ended; `process` and `container` start it
    code        the files it starts with: sent here, cloned (`clone`), unpacked (`unpack`, which reads `tar`)
    spool       its output on disk
    tree        whole process trees: who belongs to it, what it uses, how it is killed
    lean        JSON, sockets and signals without the modules that take longer to load than the agent to start
"""
