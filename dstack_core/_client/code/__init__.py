"""The code that a run brings along: from a folder, a git repository or memory to the server.

ignoring    which files stay at home: .gitignore and .dstackignore
scanning    a folder, and what is in it
reading     a file's chunks, of one version of the file
memory      the hashes of files that did not change since the last time
working     a git repository: its base on the server of git, and what differs from it
tree        what was found, as a manifest and as a tar archive
access      whether a git repository can be cloned, and with what
uploading   to the server, without what it has
"""
