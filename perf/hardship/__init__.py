"""What a server goes through when its clients mean no good, or its engine breaks.

    python -m perf.hardship [--quick] [--seed N] [--json FILE] [-- FLAGS OF haast serve]

A real ``haast serve`` is started on a free port of the loopback address, with a short queue, and everything
here happens to it over sockets, from one seed:

    fuzzing      answers under every edit of the logits, drafted, many at once
    overload     ten times the requests it can serve
    vanishing    clients that leave at random moments, politely or not
    slow reader  one that takes a byte a second
    nonsense     bodies, headers and requests that are none
    broken step, dead engine     on servers of their own, whose engine can be told to fail

Before anything else each question of a fixed list is asked alone and without speculation. Whenever a trial
gets an answer to one of them, it has to be complete and the same, token by token. After each trial the server
has to hold what it held before the first one: see ``perf.hardship.census`` for what is read and where.

What may break is judged, and breaks the exit code. What merely takes time is reported: the drivers share the
machine with the server, so a time says how both did together.
"""
