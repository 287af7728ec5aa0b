package front

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// outage remembers why connections cannot be passed on.
type outage struct {
	on atomic.Bool // since is set: saves the lock at each request

	mu     sync.Mutex // guards what follows
	since  time.Time  // zero: there is none
	known  int
	failed []error
}

// begin notes a connection that could not be passed on, and tells whether it is the first one of this outage.
func (o *outage) begin(known int, failed []error, now time.Time) (first bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if first = o.since.IsZero(); first {
		o.since = now
		o.on.Store(true)
	}
	o.known, o.failed = known, failed
	return first
}

func (o *outage) end() {
	if !o.on.Load() {
		return
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.since = time.Time{}
	o.on.Store(false)
}

// left is how much patience is left in the present outage, for the first connection that meets it all of it.
func (o *outage) left(patience time.Duration, now time.Time) time.Duration {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.since.IsZero() {
		return patience
	}
	return max(0, patience-now.Sub(o.since))
}

func (o *outage) explain(node, reason string, now time.Time) string {
	o.mu.Lock()
	defer o.mu.Unlock()
	var b strings.Builder
	fmt.Fprintf(&b, "node %s reaches no API replica", node)
	if o.since.IsZero() {
		// A connection that was opened to this node's own API, which has stopped since.
		b.WriteString(": its own has stopped serving; connect again to be passed to another")
	} else {
		fmt.Fprintf(&b, " since %s (%s): %d other replicas known, %d tried", o.since.UTC().Format(time.RFC3339), now.Sub(o.since).Round(time.Second), o.known, len(o.failed))
		for _, err := range o.failed {
			fmt.Fprintf(&b, "; %v", err)
		}
	}
	if reason != "" {
		fmt.Fprintf(&b, "; %s", reason)
	}
	return b.String()
}

// Cut says that the last connection that needed another node's replica reached none. Unlike gossip, which suspects
// for a while before it tells, this is known at once.
func (f *Front) Cut() bool { return f.outage.on.Load() }

// alone answers where no node that serves can be reached, and ends the connection: the next one is decided anew.
func (f *Front) alone(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Connection", "close") // HTTP/2: GOAWAY
	reason := f.outage.explain(f.cfg.NodeName, f.cfg.Reason(), time.Now())
	if f.cfg.Fallback != nil {
		err := f.cfg.Fallback(w, r, reason)
		if err == nil {
			return
		}
		reason += "; " + err.Error()
	}
	refuse(w, reason)
}

// refuse answers with a Kubernetes Status.
func refuse(w http.ResponseWriter, reason string) {
	body, err := json.Marshal(map[string]any{
		"kind": "Status", "apiVersion": "v1", "metadata": struct{}{}, "status": "Failure",
		"reason": "ServiceUnavailable", "code": http.StatusServiceUnavailable,
		"message": reason,
		"details": map[string]any{"retryAfterSeconds": 1},
	})
	if err != nil {
		panic(err) // strings and numbers only
	}
	h := w.Header()
	h.Set("Retry-After", "1")
	h.Set("Content-Type", "application/json")
	h.Set("Cache-Control", "no-store")
	w.WriteHeader(http.StatusServiceUnavailable)
	_, _ = w.Write(body) // fails when the client has gone
}
