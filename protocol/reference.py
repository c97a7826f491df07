"""A masked round in straight lines, to read first and to test against: no messages, no machines.

Bonawitz et al., "Practical Secure Aggregation" (CCS 2017), section 4, on the complete graph. Every
client masks its words with a stream of its own and one for each peer, and deals shares of what the
streams come from. Whoever uploads is in the sum; the survivors' shares take the masks off again:
the own stream of who uploaded, the pairwise streams of who did not. Never both of one client.

Signatures, sealed boxes, the agreement on who survived, and all that a dishonest server could try
are in ``clients/rounds/masks`` and ``server/rounds/masks``, which must give this very sum.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from secure_fedprompt.protocol import fixedpoint, masking, shamir
from secure_fedprompt.protocol.expand import add_masks
from secure_fedprompt.protocol.keys import agree
from secure_fedprompt.protocol.layout import total_size
from secure_fedprompt.protocol.plan import RoundPlan
from secure_fedprompt.protocol.ring import Words
from secure_fedprompt.protocol.shamir import Entropy


def run_masks(
    plan: RoundPlan,
    updates: Mapping[str, Words],
    uploading: set[str],
    revealing: set[str],
    entropy: Entropy,
) -> Words:
    """The sum of the uploads, modulo 2^b in each field, uint32 words in layout order.

    Args:
        plan: of the round; its cohort shares keys.
        updates: words of every client in the cohort, as ``fixedpoint.encode`` makes them.
        uploading: who gets as far as its upload.
        revealing: survivors that answer in the end, at least ``plan.threshold``.
    """
    names, points = plan.cohort, [plan.points[name] for name in plan.cohort]

    # 1. Every client draws a mask key pair and a seed, and deals shares of both.
    secrets = {name: masking.RoundSecrets.fresh(entropy) for name in names}
    public = {name: s.mask.public_key().public_bytes_raw() for name, s in secrets.items()}
    dealt = {
        name: (
            shamir.split(s.mask_bytes, points, plan.threshold, entropy),
            shamir.split(s.self_seed, points, plan.threshold, entropy),
        )
        for name, s in secrets.items()
    }

    # 2. Who uploads adds its own mask and the pairwise ones: plus towards later names, minus
    #    towards earlier ones, so that they cancel in pairs.
    total = np.zeros(total_size(plan.layout), np.uint32)
    for name in sorted(uploading):
        pair = {p: secrets[name].pair_key(plan, name, p, public[p]) for p in names if p != name}
        plus = [masking.self_key(plan, name, secrets[name].self_seed)]
        plus += [key for peer, key in pair.items() if peer > name]
        words = updates[name].copy()
        add_masks(words, plus, [key for peer, key in pair.items() if peer < name])
        fixedpoint.add_wire(plan.layout, fixedpoint.to_wire(plan.layout, words), total)

    # 3. From a threshold of survivors' shares: the seeds of who uploaded, the keys of who did not.
    used = sorted(revealing & uploading)[: plan.threshold]
    basis = shamir.basis([plan.points[name] for name in used])
    plus, minus = list[bytes](), list[bytes]()
    for name in names:
        which = int(name in uploading)
        shares = [shamir.to_int(dealt[name][which][points.index(plan.points[n])]) for n in used]
        secret = shamir.combine(basis, shares)
        if name in uploading:
            minus.append(masking.self_key(plan, name, secret))
            continue
        private = X25519PrivateKey.from_private_bytes(secret)
        for peer in sorted(uploading):
            key = masking.pair_key(plan, name, peer, agree(private, public[peer], peer))
            (minus if name > peer else plus).append(key)

    # 4. What is left is the sum.
    add_masks(total, plus, minus)
    return total
