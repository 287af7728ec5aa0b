package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"net/url"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"skein.io/skein/gossip/membership"
	"skein.io/skein/node/client"
	"skein.io/skein/scheduler"
)

// whyPath is where a replica asks the leader why a pod is where it is, on the agent's port.
const whyPath = "/skein/v1/why"

// whyTimeout bounds how long an answer takes.
const whyTimeout = 10 * time.Second

// why explains the placement of a pod: the leader knows, whichever node is asked. Its errors are refusals, or apierrors of the leader's own.
func (n *node) why(ctx context.Context, namespace, pod string) (client.Why, error) {
	w, err := n.inspector.Why(namespace, pod)
	if !errors.Is(err, scheduler.ErrNotLeading) {
		return w, err
	}
	leader := ""
	for _, s := range n.host.Status() {
		if s.Shard == systemShard {
			leader = s.Leader.Node
		}
	}
	for _, m := range n.gossip.Members() {
		if m.Name == leader && !m.Self {
			ctx, cancel := context.WithTimeout(ctx, whyTimeout)
			defer cancel()
			return n.askWhy(ctx, m, namespace, pod)
		}
	}
	return w, refusal(http.StatusServiceUnavailable, "no leader places pods now; ask again in a moment")
}

func (n *node) askWhy(ctx context.Context, m membership.Member, namespace, pod string) (w client.Why, err error) {
	u := "https://" + netip.AddrPortFrom(m.Addr, tagPort(m, membership.TagAgent, agentPort)).String() + whyPath + "?" + url.Values{"namespace": {namespace}, "pod": {pod}}.Encode()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u, nil)
	if err != nil {
		return w, err
	}
	t := &http.Transport{TLSClientConfig: n.id.NodeClientTLS(m.Name), DisableKeepAlives: true}
	resp, err := (&http.Client{Transport: t}).Do(req)
	if err != nil {
		return w, refusal(http.StatusServiceUnavailable, "ask the leader %s: %v", m.Name, err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body) // the leader is a member of this cluster; its answer grows with the nodes
	if err != nil {
		return w, refusal(http.StatusServiceUnavailable, "ask the leader %s: %v", m.Name, err)
	}
	if resp.StatusCode != http.StatusOK {
		e := &client.Error{Code: resp.StatusCode}
		if json.Unmarshal(b, e) != nil || e.Message == "" {
			e.Message = fmt.Sprintf("ask the leader %s: %s", m.Name, resp.Status)
		}
		return w, e
	}
	if err := json.Unmarshal(b, &w); err != nil {
		return w, fmt.Errorf("ask the leader %s: unreadable answer: %w", m.Name, err)
	}
	return w, nil
}

// serveWhy answers replicas; they have asked whether the user may know.
func (n *node) serveWhy(w http.ResponseWriter, r *http.Request) {
	if err := n.heeds(r); err != nil {
		writeRefusal(w, refusal(http.StatusForbidden, "only nodes with a replica may ask: %v", err))
		return
	}
	q := r.URL.Query()
	answer, err := n.inspector.Why(q.Get("namespace"), q.Get("pod"))
	if err != nil {
		writeRefusal(w, asRefusal(err))
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(answer) // the caller went away
}

// asRefusal gives an error the status code that it stands for.
func asRefusal(err error) error {
	var status interface{ Status() metav1.Status }
	switch {
	case errors.Is(err, scheduler.ErrNotLeading):
		return refusal(http.StatusServiceUnavailable, "%v", err)
	case errors.As(err, &status):
		return refusal(int(status.Status().Code), "%v", err)
	}
	return err
}
