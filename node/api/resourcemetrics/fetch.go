package resourcemetrics

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"

	corev1 "k8s.io/api/core/v1"

	"skein.io/skein/node/agent/usage"
)

// maxAnswer bounds an agent's answer, in bytes: a container takes about 150.
const maxAnswer = 16 << 20

// agentPort is the port of agents whose Node object does not name it.
const agentPort = 10250

// fetch asks the agent of a node.
func fetch(ctx context.Context, t http.RoundTripper, n *corev1.Node) (usage.Report, error) {
	var r usage.Report
	address, err := agentAddress(n)
	if err != nil {
		return r, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+address+"/stats/usage", nil)
	if err != nil {
		return r, fmt.Errorf("agent of node %s: %w", n.Name, err)
	}
	resp, err := t.RoundTrip(req)
	if err != nil {
		return r, fmt.Errorf("agent of node %s: %w", n.Name, err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	switch {
	case err != nil:
		return r, fmt.Errorf("agent of node %s: %w", n.Name, err)
	case resp.StatusCode != http.StatusOK:
		return r, fmt.Errorf("agent of node %s: %s: %.200s", n.Name, resp.Status, b)
	case len(b) > maxAnswer:
		return r, fmt.Errorf("agent of node %s: an answer of more than %d bytes", n.Name, maxAnswer)
	}
	if err := json.Unmarshal(b, &r); err != nil {
		return r, fmt.Errorf("agent of node %s: unreadable answer: %w", n.Name, err)
	}
	return r, nil
}

// agentAddress is where the agent of a node listens.
func agentAddress(n *corev1.Node) (string, error) {
	port := int(n.Status.DaemonEndpoints.KubeletEndpoint.Port)
	if port == 0 {
		port = agentPort
	}
	for _, kind := range []corev1.NodeAddressType{corev1.NodeInternalIP, corev1.NodeExternalIP} {
		for _, a := range n.Status.Addresses {
			if a.Type == kind {
				return net.JoinHostPort(a.Address, strconv.Itoa(port)), nil
			}
		}
	}
	return "", errors.New("node " + n.Name + " has no address")
}
