package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"
	clientv3 "go.etcd.io/etcd/client/v3"
	"k8s.io/component-base/version"

	"skein.io/skein/consensus/host"
	"skein.io/skein/gossip/health"
	"skein.io/skein/gossip/identity"
	"skein.io/skein/gossip/membership"
	"skein.io/skein/node/client"
	"skein.io/skein/node/join"
)

// maxBody bounds what a control request may say, in bytes.
const maxBody = 1 << 20

// refusal is an answer with a status code and a message for people.
func refusal(code int, format string, a ...any) error {
	return &client.Error{Code: code, Message: fmt.Sprintf(format, a...)}
}

// controlHandler is Skein's own API, below /skein/v1/. Whoever mounts it has decided who may call: the unix socket by its
// mode, the API server by RBAC.
func (n *node) controlHandler() http.Handler {
	mux := http.NewServeMux()
	handle := func(pattern string, f func(r *http.Request) (any, error)) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			r.Body = http.MaxBytesReader(w, r.Body, maxBody)
			v, err := f(r)
			if err != nil {
				writeRefusal(w, err)
				return
			}
			if raw, ok := v.([]byte); ok {
				w.Header().Set("Content-Type", "application/yaml")
				_, _ = w.Write(raw) // the client went away
				return
			}
			w.Header().Set("Content-Type", "application/json")
			_ = json.NewEncoder(w).Encode(v) // the client went away
		})
	}
	handle("GET /skein/v1/members", func(*http.Request) (any, error) { return n.members(), nil })
	handle("GET /skein/v1/status", func(r *http.Request) (any, error) { return n.status(r.Context()), nil })
	mux.Handle("GET /skein/v1/metrics", promhttp.HandlerFor(n.metrics, promhttp.HandlerOpts{}))
	handle("GET /skein/v1/tokens", n.listTokens)
	handle("POST /skein/v1/tokens", n.createToken)
	handle("DELETE /skein/v1/tokens/{id}", n.revokeToken)
	handle("GET /skein/v1/kubeconfig", n.kubeconfig)
	handle("GET /skein/v1/keys", n.keysStatus)
	handle("POST /skein/v1/keys/rotate", n.rotateKeys)
	handle("GET /skein/v1/store/etcd", n.etcdAccess)
	handle("POST /skein/v1/leave", n.leave)
	mux.HandleFunc("POST "+client.BackupPath, n.serveBackup)
	mux.HandleFunc(client.LastKnownPath+"/", n.serveLastKnown)
	return mux
}

func writeRefusal(w http.ResponseWriter, err error) {
	e := &client.Error{Code: http.StatusInternalServerError, Message: err.Error()}
	errors.As(err, &e)
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(e.Code)
	_ = json.NewEncoder(w).Encode(e) // the client went away
}

// serveControl answers on the unix socket, which only root can open.
func (n *node) serveControl(ctx context.Context) error {
	path := client.SocketPath(n.cfg.StateDir)
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return err
	}
	if err := os.Chmod(path, 0o600); err != nil {
		l.Close()
		return err
	}
	return serve(ctx, &http.Server{Handler: asRoot(n.controlHandler()), ReadHeaderTimeout: 10 * time.Second}, l)
}

// asRoot marks the requests as root's.
func asRoot(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), rootKey{}, true)))
	})
}

// serve runs an HTTP server until ctx ends, then gives requests a moment to finish.
func serve(ctx context.Context, s *http.Server, ls ...net.Listener) error {
	ended := make(chan error, len(ls))
	for _, l := range ls {
		go func() {
			if s.TLSConfig != nil {
				ended <- s.ServeTLS(l, "", "")
			} else {
				ended <- s.Serve(l)
			}
		}()
	}
	var err error
	left := len(ls)
	select {
	case <-ctx.Done():
	case err = <-ended:
		left--
	}
	sctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	if s.Shutdown(sctx) != nil {
		s.Close()
	}
	for ; left > 0; left-- {
		<-ended
	}
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}

func (n *node) members() []client.Member {
	var out []client.Member
	for _, m := range n.gossip.Members() {
		rtt := -1.0
		if d, ok := n.gossip.RTT(m.Name); ok && !m.Self {
			rtt = float64(d) / float64(time.Millisecond)
		}
		role := m.Tags[membership.TagRole]
		if m.Verdict == health.Dead || m.Verdict == health.Left {
			role = "-" // what it held when it was last heard of says nothing about now
		}
		out = append(out, client.Member{
			Name: m.Name, Address: m.Addr.String(), Status: m.Verdict.String(), SinceSeconds: time.Since(m.Since).Seconds(),
			Zone: m.Tags[membership.TagZone], Role: role, Version: m.Tags[membership.TagVersion], RTTMillis: rtt, Self: m.Self,
		})
	}
	slices.SortFunc(out, func(a, b client.Member) int { return strings.Compare(a.Name, b.Name) })
	return out
}

func (n *node) status(ctx context.Context) client.Status {
	s := client.Status{Node: n.cfg.Name, Cluster: n.id.ClusterID, Version: version.Get().GitVersion, Uptime: time.Since(n.started).Seconds()}
	names := func(ms []host.Member) (out []string) {
		for _, m := range ms {
			out = append(out, m.Node)
		}
		slices.Sort(out)
		return out
	}
	for _, x := range n.host.Status() {
		n.reportStore(x)
		shard := client.Shard{Name: x.Shard, Leader: x.Leader.Node, Term: host.RaftTerm(x.Term), Applied: x.Applied,
			Role: string(x.Role), Ready: x.Ready, Revision: x.Revision, InUse: x.SizeInUse, Size: x.Size, Voters: names(x.Voters), Spares: names(x.NonVoters)}
		if x.Role == host.RoleNone {
			n.rolesFromGossip(&shard)
		}
		s.Shards = append(s.Shards, shard)
		if x.Shard == systemShard && shard.Leader != "" {
			if word, err := n.word(ctx, shard.Leader); err != nil {
				s.PlacementError = err.Error()
			} else {
				s.Placement, s.Zones = word.Placement, word.Zones
			}
		}
	}
	s.Backup = n.reportBackups(ctx)
	s.Parts = n.parts.list()
	return s
}

// rolesFromGossip fills in what a node without a replica knows of one: what the others say that they are.
func (n *node) rolesFromGossip(s *client.Shard) {
	for _, m := range n.gossip.Members() {
		if m.Verdict == health.Dead || m.Verdict == health.Left {
			continue
		}
		if slices.Contains(strings.Split(m.Tags[tagLeads], ","), s.Name) {
			s.Leader = m.Name
		}
		switch host.Role(m.Tags[membership.TagRole]) { // the same nodes vote in all shards
		case host.RoleLeader, host.RoleVoter:
			s.Voters = append(s.Voters, m.Name)
		case host.RoleNonVoter:
			s.Spares = append(s.Spares, m.Name)
		}
	}
	slices.Sort(s.Voters)
	slices.Sort(s.Spares)
}

// tokens is the token store, which only a node with a replica has.
func (n *node) tokens() (*join.TokenStore, error) {
	c, ok := n.host.Client(systemShard)
	if srv, keys, _ := n.api.get(); ok && srv != nil {
		return join.NewTokenStore(c.KV, keys.authority.Hash()), nil
	}
	return nil, n.notHere("handle join tokens")
}

// notHere explains what only replicas can do, and names them.
func (n *node) notHere(what string) error {
	var at []string
	for _, m := range n.replicas() {
		if !m.Self {
			at = append(at, fmt.Sprintf("%s (%s)", m.Name, m.Addr))
		}
	}
	if len(at) == 0 {
		return refusal(http.StatusServiceUnavailable, "node %s holds no replica of the store that is in contact with a leader, and sees no other node that is: it cannot %s now", n.cfg.Name, what)
	}
	return refusal(http.StatusConflict, "node %s holds no replica of the store, so it cannot %s: do it on %s, or from here with --kubeconfig", n.cfg.Name, what, strings.Join(at, " or "))
}

func tokenOut(t join.TokenInfo) client.Token {
	o := client.Token{ID: t.ID, Description: t.Description, Created: t.Created, Uses: t.Uses, MaxUses: t.MaxUses}
	if !t.Expires.IsZero() {
		o.Expires = &t.Expires
	}
	if !t.Revoked.IsZero() {
		o.Description = strings.TrimSpace("(revoked) " + o.Description)
	}
	return o
}

func (n *node) listTokens(r *http.Request) (any, error) {
	ts, err := n.tokens()
	if err != nil {
		return nil, err
	}
	infos, err := ts.List(r.Context())
	if err != nil {
		return nil, err
	}
	out := []client.Token{}
	for _, t := range infos {
		out = append(out, tokenOut(t))
	}
	return out, nil
}

func (n *node) createToken(r *http.Request) (any, error) {
	var q client.TokenRequest
	d := json.NewDecoder(r.Body)
	d.DisallowUnknownFields()
	if err := d.Decode(&q); err != nil {
		return nil, refusal(http.StatusBadRequest, "token request: %v", err)
	}
	if q.TTLSeconds < 0 || q.MaxUses < 0 {
		return nil, refusal(http.StatusBadRequest, "token request: ttlSeconds %d and maxUses %d must not be negative", q.TTLSeconds, q.MaxUses)
	}
	ts, err := n.tokens()
	if err != nil {
		return nil, err
	}
	ttl := time.Duration(q.TTLSeconds) * time.Second
	token, info, err := ts.Create(r.Context(), join.TokenOptions{TTL: ttl, MaxUses: q.MaxUses, Description: q.Description})
	if err != nil {
		return nil, err
	}
	o := tokenOut(info)
	o.Text = token.String()
	return o, nil
}

func (n *node) revokeToken(r *http.Request) (any, error) {
	ts, err := n.tokens()
	if err != nil {
		return nil, err
	}
	if err := ts.Revoke(r.Context(), r.PathValue("id")); err != nil {
		if errors.Is(err, join.ErrTokenUnknown) {
			return nil, refusal(http.StatusNotFound, "%v", err)
		}
		return nil, err
	}
	return struct{}{}, nil
}

func (n *node) kubeconfig(r *http.Request) (any, error) {
	srv, keys, _ := n.api.get()
	if srv == nil {
		return nil, n.notHere("issue an administrator's credentials")
	}
	server := r.URL.Query().Get("server")
	if server == "" {
		server = serverURL(n.cfg.Address)
	} else if u, err := url.Parse(server); err != nil || u.Scheme != "https" || u.Host == "" {
		return nil, refusal(http.StatusBadRequest, "server %q: want a URL like https://ADDRESS:%d", server, apiPort)
	}
	return kubeconfig(keys.authority, server, time.Now())
}

// firstJoinLine makes the first token of a new cluster, once, and returns the command that uses it.
func (n *node) firstJoinLine(ctx context.Context) (string, error) {
	ts, err := n.tokens()
	if err != nil {
		return "", nil // a joiner: those that it joined have a token
	}
	have, err := ts.List(ctx)
	if err != nil || len(have) > 0 || len(n.gossip.Members()) > 1 {
		return "", err
	}
	token, _, err := ts.Create(ctx, join.TokenOptions{TTL: join.DefaultTokenTTL, Description: "made when the cluster was"})
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("skein join %s --token %s", n.cfg.Address, token), nil
}

// joinHandler takes new nodes in; it runs on replicas.
func (n *node) joinHandler(keys clusterKeys, c *clientv3.Client) (*join.Server, error) {
	return join.NewServer(join.ServerConfig{
		Tokens:    join.NewTokenStore(c.KV, keys.authority.Hash()),
		Authority: func() *identity.Authority { return keys.authority },
		Nodes: func(ctx context.Context) (out []join.Known, err error) {
			// The Node objects of the cluster before a restore wait for whoever joins under their names.
			free, _, err := readForgotten(ctx, c.KV)
			if err != nil {
				return nil, err
			}
			for _, m := range n.gossip.Members() {
				if m.Verdict != health.Left {
					out = append(out, join.Known{Name: m.Name, IPs: []netip.Addr{m.Addr}})
				}
			}
			for _, o := range n.desired.Nodes() {
				if slices.Contains(free, o.Name) {
					continue
				}
				out = append(out, join.Known{Name: o.Name, IPs: []netip.Addr{internalIP(o)}})
			}
			return out, nil
		},
		Info: func(context.Context) (join.Info, error) {
			i := join.Info{GossipKey: n.id.GossipKey, Cluster: n.id.Cluster}
			for _, m := range n.gossip.Members() {
				if m.Verdict == health.Alive {
					i.Seeds = append(i.Seeds, m.AddrPort())
				}
			}
			return i, nil
		},
		Version: version.Get().GitVersion, Logger: n.log.With("part", "join"),
	})
}
