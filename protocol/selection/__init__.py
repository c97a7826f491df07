"""Secure comparison and selection between two parties; see docs/secure-selection.md.

    from secure_fedprompt.protocol.selection import circuits, parties

    circuit = circuits.top_s(5, 2)                       # the 2 largest of 5 shared keys, in order
    print(circuit)                                       # AND gates, layers, bytes
    parties.together(circuit, ours, theirs, os.urandom)  # both parties in one process

``parties.Garbler`` and ``parties.Evaluator`` are the two sides as machines without I/O.
"""
