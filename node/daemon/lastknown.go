package daemon

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"time"

	"skein.io/skein/consensus/host"
	"skein.io/skein/gossip/membership"
	"skein.io/skein/node/client"
)

// unnoticed is how long a node may be cut off before gossip tells it, and with it how much older than it seems its knowledge may be.
const unnoticed = 3 * time.Second

// noteSeen notes that the node's own copy of what concerns it is the truth, while it follows an API that somebody serves.
func (n *node) noteSeen() {
	if !n.desired.Watched() {
		return
	}
	if s, _, _ := n.api.get(); s != nil && n.shardsReady() || s == nil && len(n.replicas()) > 0 && !n.front.Cut() {
		n.desired.Saw(time.Now())
	}
}

// age is how old the node's own copy may be; false when it has none.
func (n *node) age() (time.Duration, bool) {
	seen := n.desired.Seen()
	return max(0, time.Since(seen)) + unnoticed, !seen.IsZero()
}

// servesBehind is the tag of a node that serves the API without a leader of the store.
const servesBehind = "0"

// behind tells whether this node's replica of some shard has lost its leader.
func (n *node) behind() bool {
	for _, s := range n.host.Shards().Shards() {
		if _, lost := n.host.Silence(s.Name); lost {
			return true
		}
	}
	return false
}

// announceReady keeps the tag true by which other nodes know where to pass connections.
func (n *node) announceReady() {
	tag := ""
	if s, _, _ := n.api.get(); s != nil {
		if tag = "1"; n.behind() {
			tag = servesBehind
		}
	}
	n.announce(map[string]string{membership.TagReady: tag})
}

// lastKnown is how long the shard of the keys with a prefix has had no leader, in the eyes of this node's replica.
func (n *node) lastKnown(ctx context.Context, prefix string) (context.Context, time.Duration, bool) {
	silence, lost := n.host.Silence(n.host.Shards().ForKey(prefix).Name)
	if !lost {
		return nil, 0, false
	}
	return host.WithLocalReads(ctx), silence, true
}

// serveLastKnown answers reads of Kubernetes' API on the control socket from what the node knows: for root, who can read the node's disk as well.
func (n *node) serveLastKnown(w http.ResponseWriter, r *http.Request) {
	if r.Context().Value(rootKey{}) == nil {
		writeRefusal(w, refusal(http.StatusForbidden, "this is for root on the node itself: elsewhere ask its API"))
		return
	}
	if at := n.replicas(); len(at) > 0 {
		writeRefusal(w, n.notHere("read for you without a kubeconfig"))
		return
	}
	r2 := r.Clone(r.Context())
	r2.URL.Path, r2.URL.RawPath = strings.TrimPrefix(r.URL.Path, client.LastKnownPath), ""
	if err := n.thin.AnswerRoot(w, r2, fmt.Sprintf("node %s reaches no API replica", n.cfg.Name)); err != nil {
		writeRefusal(w, refusal(http.StatusServiceUnavailable, "node %s reaches no API replica: %v", n.cfg.Name, err))
	}
}
