package daemon

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"skein.io/skein/gossip/health"
	"skein.io/skein/gossip/identity"
	"skein.io/skein/gossip/membership"
)

// tagGeneration is NUMBER-HASH of the generation that a node is in; absent in the first. It is a hint: what a node acts on is the proof,
// which it asks the other for and which the cluster's CA has signed.
const tagGeneration = "gn"

func (n *node) verifyGeneration(proof []byte) (uint64, error) {
	g, err := identity.VerifyGeneration(n.id.CA, proof)
	return g.Number, err
}

// generationTag is the tag of a generation, "" of the first.
func generationTag(number uint64, proof []byte) string {
	if number == 0 {
		return ""
	}
	sum := sha256.Sum256(proof)
	return strconv.FormatUint(number, 10) + "-" + hex.EncodeToString(sum[:4])
}

func generationNumber(tag string) uint64 {
	number, _, _ := strings.Cut(tag, "-")
	n, err := strconv.ParseUint(number, 10, 64)
	if err != nil {
		return 0
	}
	return n
}

// watchGeneration makes this node one of the newest generation that a living member proves: after a restore or a recovery, what a
// member of the cluster before holds is not the cluster's any more.
func (n *node) watchGeneration(ctx context.Context) error {
	changed, end := n.gossip.Subscribe()
	defer end()
	for {
		retry := n.lookForGeneration(ctx)
		var again <-chan time.Time
		if retry {
			again = time.After(time.Second)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		case <-again:
		}
	}
}

// lookForGeneration tells whether it is to be called again without news.
func (n *node) lookForGeneration(ctx context.Context) (again bool) {
	number, proof := n.host.Generation()
	mine := generationTag(number, proof)
	n.announce(map[string]string{tagGeneration: mine})
	var conflict error
	for _, m := range n.gossip.Members() {
		tag := m.Tags[tagGeneration]
		if m.Self || m.Verdict != health.Alive || tag == mine {
			continue
		}
		switch theirs := generationNumber(tag); {
		case theirs == number && number > 0:
			conflict = errors.Join(conflict, fmt.Errorf("node %s runs another store, which was recovered or restored apart from this one's: remove the state of the nodes of one of them and let them join the other", m.Name))
		case theirs > number:
			if err := n.adoptGeneration(ctx, m.Tags[membership.TagID], m.Name); err != nil {
				n.log.Warn("cannot join the cluster's new generation yet", "node", m.Name, "err", err)
				again = true
			}
		}
	}
	detail := "the first"
	if number > 0 {
		if g, err := identity.VerifyGeneration(n.id.CA, proof); err == nil {
			detail = fmt.Sprintf("%d: %s on node %s at %s", g.Number, g.Why, g.Node, g.Time.Format(time.RFC3339))
		}
	}
	if number > 0 || conflict != nil {
		n.parts.set("generation", conflict, detail)
	}
	return again
}

func (n *node) adoptGeneration(ctx context.Context, hostID, name string) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	proof, err := n.host.FetchGeneration(ctx, hostID)
	if err != nil {
		return err
	}
	adopted, err := n.host.Adopt(ctx, proof)
	if adopted {
		n.log.Warn("the store was restored or recovered while this node was away; its own replicas, which nobody needs any more, were deleted", "told by", name)
		number, proof := n.host.Generation()
		n.announce(map[string]string{tagGeneration: generationTag(number, proof)})
	}
	return err
}
