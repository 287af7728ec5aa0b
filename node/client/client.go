// Package client speaks Skein's own control API (/skein/v1/...): the part of a node that Kubernetes' API does not
// have: the gossip view, the store's shards, join tokens, credentials, leaving. A root user on a node reaches it through
// the node's unix socket; from elsewhere any node's port 6443 serves it to a client whose certificate RBAC allows.
//
// The types here are the wire format, used by the daemon's handlers too; they change only by adding fields.
// Methods are safe for concurrent use. Package cmd and the daemon are its callers.
package client

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"skein.io/skein/scheduler"
	"skein.io/skein/scheduler/placement"
)

// Headers of Kubernetes requests and answers, while a node cannot reach the truth and answers reads from what it knew last.
const (
	// AgeHeader tells how many seconds old the state is that an answer shows. Answers without it show the present.
	AgeHeader = "X-Skein-Age"
	// MaxAgeHeader bounds that, in seconds; 0: only the present will do.
	MaxAgeHeader = "X-Skein-Max-Age"
)

// LastKnownPath is where a node's socket answers reads of Kubernetes' API (the path continues with theirs) while the node reaches no
// replica.
const LastKnownPath = "/skein/v1/lastknown"

// Member is one node as this node's gossip sees it.
type Member struct {
	Name    string `json:"name"`
	Address string `json:"address"`
	// Status is alive, suspect, dead or left: this node's own verdict.
	Status string `json:"status"`
	// SinceSeconds is how long the verdict has held, by this node's monotonic clock.
	SinceSeconds float64 `json:"sinceSeconds"`
	Zone         string  `json:"zone,omitempty"`
	// Role held now: leader, voter, spare or none.
	Role    string `json:"role"`
	Version string `json:"version"`
	// RTTMillis is the round-trip time that the network coordinates predict; negative when unknown.
	RTTMillis float64 `json:"rttMillis"`
	Self      bool    `json:"self,omitempty"`
}

// Shard is the state of one Raft group as this node sees it.
type Shard struct {
	Name    string `json:"name"`
	Leader  string `json:"leader,omitempty"`
	Term    uint64 `json:"term"`
	Applied uint64 `json:"applied"`
	Role    string `json:"role"`
	// Ready, Revision, InUse and Size (bytes of the database) are of the replica here.
	Ready    bool  `json:"ready"`
	Revision int64 `json:"revision,omitempty"`
	InUse    int64 `json:"inUseBytes,omitempty"`
	Size     int64 `json:"sizeBytes,omitempty"`

	Voters []string `json:"voters,omitempty"`
	Spares []string `json:"spares,omitempty"`
}

// Placement is what the leader has decided about the replicas of the store.
type Placement struct {
	Nodes  []NodePlacement `json:"nodes"`
	Shards []ShardPlan     `json:"shards"`
}

// NodePlacement says why a node votes, or why not.
type NodePlacement struct {
	Node string `json:"node"`
	Zone string `json:"zone,omitempty"`
	Why  string `json:"why"`
}

// ShardPlan is the next step of a shard's membership, empty if there is none, and what cannot be done now.
type ShardPlan struct {
	Shard   string   `json:"shard"`
	Next    string   `json:"next,omitempty"`
	Blocked []string `json:"blocked,omitempty"`
}

// Part is the health of one component of the node.
type Part struct {
	Name    string `json:"name"`
	Healthy bool   `json:"healthy"`
	Message string `json:"message,omitempty"`
}

// Status is what `skein status` shows.
type Status struct {
	Node    string  `json:"node"`
	Cluster string  `json:"cluster"`
	Version string  `json:"version"`
	Uptime  float64 `json:"uptimeSeconds"`
	Shards  []Shard `json:"shards"`
	Parts   []Part  `json:"parts"`
	// Backup is nil where none is scheduled, and on nodes without a replica.
	Backup *BackupStatus `json:"backup,omitempty"`
	// Placement is the leader's word on the voters; nil with PlacementError if it could not be had.
	Placement      *Placement `json:"placement,omitempty"`
	PlacementError string     `json:"placementError,omitempty"`
	// Zones is the leader's word on the life of nodes; empty where Placement is nil.
	Zones []Zone `json:"zones,omitempty"`
}

// Zone is how the nodes of a zone fare and how fast the pods of its lost nodes are moved away.
type Zone struct {
	Name     string `json:"name"`
	Ready    int    `json:"ready"`
	NotReady int    `json:"notReady"`
	// Evictions is "free", "stopped" or "one node every 10s"; Braked is false if it is free. It has been so for SinceSeconds.
	Evictions    string  `json:"evictions"`
	Braked       bool    `json:"braked,omitempty"`
	SinceSeconds float64 `json:"sinceSeconds"`
	// Held is how many lost nodes keep their pods for that; Brakes how often evictions were slowed or stopped while this leader's daemon ran.
	Held   int `json:"held,omitempty"`
	Brakes int `json:"brakes,omitempty"`
}

// BackupStatus says what became of the scheduled backups.
type BackupStatus struct {
	// LastSuccess is when the newest good one was made, by the clock of Node, which holds it as File.
	LastSuccess time.Time `json:"lastSuccess,omitzero"`
	File        string    `json:"file,omitempty"`
	Node        string    `json:"node,omitempty"`
	Bytes       int64     `json:"bytes,omitempty"`
	// HeldMicroseconds is how long writers waited for it.
	HeldMicroseconds int64 `json:"heldMicroseconds,omitempty"`
	// LastError since then.
	LastError     string    `json:"lastError,omitempty"`
	LastErrorTime time.Time `json:"lastErrorTime,omitzero"`
}

// Token describes a join token; Text (the secret) is set only in the answer to its creation.
type Token struct {
	ID          string     `json:"id"`
	Description string     `json:"description,omitempty"`
	Created     time.Time  `json:"created"`
	Expires     *time.Time `json:"expires,omitempty"`
	Uses        int        `json:"uses"`
	MaxUses     int        `json:"maxUses,omitempty"`
	Text        string     `json:"text,omitempty"`
}

// TokenRequest asks for a new join token.
type TokenRequest struct {
	Description string `json:"description,omitempty"`
	// TTLSeconds is the life of the token in seconds; 0 means that it never expires.
	TTLSeconds int64 `json:"ttlSeconds"`
	// MaxUses bounds how many nodes may join with it; 0 means any number.
	MaxUses int `json:"maxUses,omitempty"`
}

// Keys is what `skein keys status` shows: the keys that seal the cluster's secrets, by their ids.
type Keys struct {
	Primary string `json:"primary"` // the key that seals
	Keys    []Key  `json:"keys"`    // on the ring of the node that was asked
	// Rotation is one that has not ended, Last how the latest one did.
	Rotation *KeyRotation `json:"rotation,omitempty"`
	Last     *KeyRotation `json:"last,omitempty"`
	// Replicas are the nodes that hold a ring.
	Replicas []KeyReplica `json:"replicas"`
}

// Key is one key.
type Key struct {
	ID      string    `json:"id"`
	Created time.Time `json:"created"`
}

// KeyRotation is a rotation's state.
type KeyRotation struct {
	ID    string `json:"id"`
	Phase string `json:"phase,omitempty"`
	From  string `json:"from,omitempty"`
	To    string `json:"to,omitempty"`
	// Done of Total values have been sealed anew.
	Done  int `json:"done"`
	Total int `json:"total,omitempty"`
	// Waits says what it waits for.
	Waits   string     `json:"waits,omitempty"`
	Refused string     `json:"refused,omitempty"` // why nothing was done
	Ended   *time.Time `json:"ended,omitempty"`
}

// KeyReplica is what a node says of its ring.
type KeyReplica struct {
	Node    string   `json:"node"`
	Primary string   `json:"primary,omitempty"`
	Keys    []string `json:"keys,omitempty"`
	Error   string   `json:"error,omitempty"` // why it does not answer
}

// RotateRequest asks for a rotation.
type RotateRequest struct {
	// Force goes on although a voter does not answer.
	Force bool `json:"force,omitempty"`
}

// Why says why a pod is where it is, and NodeReport what one node has to say about it.
type (
	Why        = scheduler.Why
	NodeReport = placement.NodeReport
	// FilterReport and ScoreReport are parts of a NodeReport.
	FilterReport = placement.FilterReport
	ScoreReport  = placement.ScoreReport
)

// Error is a refusal by the daemon.
type Error struct {
	Code    int    `json:"code"`
	Message string `json:"message"`
}

func (e *Error) Error() string { return e.Message }

// Client talks to one node.
type Client struct {
	http *http.Client
	base string
	name string
}

// DefaultStateDir is where a node keeps its state unless told otherwise.
const DefaultStateDir = "/var/lib/skein"

// SocketPath is the control socket of the node whose state lies in dir.
func SocketPath(dir string) string { return filepath.Join(dir, "skein.sock") }

// Unix returns a client of the node on this machine.
func Unix(socket string) *Client {
	t := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", socket)
	}}
	return &Client{http: &http.Client{Transport: t}, base: "http://skein", name: socket}
}

// HTTP returns a client of a remote node; base is its https URL and hc carries the credentials.
func HTTP(base string, hc *http.Client) *Client { return &Client{http: hc, base: base, name: base} }

// explain turns the errors that newcomers meet into what to do about them.
func (c *Client) explain(err error) error {
	switch {
	case errors.Is(err, os.ErrNotExist):
		return fmt.Errorf("no Skein node runs here (%s does not exist): start one with 'skein up' or 'skein join', or name its state directory with --state-dir", c.name)
	case errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("the Skein node at %s does not answer: is it running? ('systemctl status skein', or start it with 'skein up')", c.name)
	case errors.Is(err, os.ErrPermission):
		return fmt.Errorf("%s: permission denied: this command needs root", c.name)
	}
	return fmt.Errorf("%s: %w", c.name, err)
}

func (c *Client) do(ctx context.Context, method, path string, in, out any) error {
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return err
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, c.base+"/skein/v1/"+path, body)
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := c.http.Do(req)
	if err != nil {
		return c.explain(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 16<<20))
	if err != nil {
		return c.explain(err)
	}
	if resp.StatusCode/100 != 2 {
		e := &Error{Code: resp.StatusCode}
		if json.Unmarshal(b, e) != nil || e.Message == "" {
			e.Message = fmt.Sprintf("%s %s: %s", method, path, resp.Status)
		}
		return e
	}
	if raw, ok := out.(*[]byte); ok {
		*raw = b
		return nil
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(b, out); err != nil {
		return fmt.Errorf("%s: unreadable answer to %s: %w", c.name, path, err)
	}
	return nil
}

// Members lists the cluster as the node's gossip sees it.
func (c *Client) Members(ctx context.Context) (m []Member, err error) {
	return m, c.do(ctx, http.MethodGet, "members", nil, &m)
}

// Status reports the node's shards and parts.
func (c *Client) Status(ctx context.Context) (s Status, err error) {
	return s, c.do(ctx, http.MethodGet, "status", nil, &s)
}

// CreateToken makes a join token; its Text can be read only here.
func (c *Client) CreateToken(ctx context.Context, r TokenRequest) (t Token, err error) {
	return t, c.do(ctx, http.MethodPost, "tokens", r, &t)
}

// Tokens lists the join tokens, without their secrets.
func (c *Client) Tokens(ctx context.Context) (t []Token, err error) {
	return t, c.do(ctx, http.MethodGet, "tokens", nil, &t)
}

// RevokeToken makes a join token worthless.
func (c *Client) RevokeToken(ctx context.Context, id string) error {
	return c.do(ctx, http.MethodDelete, "tokens/"+url.PathEscape(id), nil, nil)
}

// Leave takes the node out of the cluster: its pods elsewhere, its vote handed on, its state marked left.
func (c *Client) Leave(ctx context.Context) error {
	return c.do(ctx, http.MethodPost, "leave", nil, nil)
}

// Kubeconfig returns an administrator's kubeconfig, in YAML, whose server is the given URL (empty: the node itself).
func (c *Client) Kubeconfig(ctx context.Context, server string) (b []byte, err error) {
	return b, c.do(ctx, http.MethodGet, "kubeconfig?server="+url.QueryEscape(server), nil, &b)
}

// EtcdAccess is what etcd's tools need to reach the store.
type EtcdAccess struct {
	// Endpoints are URLs by shard.
	Endpoints map[string][]string `json:"endpoints"`
	// CA of the servers, and an administrator's certificate and key, in PEM.
	CA   []byte `json:"ca"`
	Cert []byte `json:"cert"`
	Key  []byte `json:"key"`
}

// EtcdAccess returns where the store is served as etcd, and credentials for it.
func (c *Client) EtcdAccess(ctx context.Context) (a EtcdAccess, err error) {
	return a, c.do(ctx, http.MethodGet, "store/etcd", nil, &a)
}

// BackupPath is where a node hands out backups.
const BackupPath = "/skein/v1/backup"

// BackupRequest asks for a backup.
type BackupRequest struct {
	// Passphrase seals the keys in it; empty: they are in clear.
	Passphrase string `json:"passphrase,omitempty"`
}

// Backup streams a backup of the whole cluster. Close it.
func (c *Client) Backup(ctx context.Context, r BackupRequest) (io.ReadCloser, error) {
	b, err := json.Marshal(r)
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.base+BackupPath, bytes.NewReader(b))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, c.explain(err)
	}
	if resp.StatusCode == http.StatusOK {
		return resp.Body, nil
	}
	defer resp.Body.Close()
	e := &Error{Code: resp.StatusCode}
	msg, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil || json.Unmarshal(msg, e) != nil || e.Message == "" {
		e.Message = "backup: " + resp.Status
	}
	return nil, e
}

// Keys reports the keys that seal the cluster's secrets, by their ids.
func (c *Client) Keys(ctx context.Context) (k Keys, err error) {
	return k, c.do(ctx, http.MethodGet, "keys", nil, &k)
}

// RotateKeys asks for a new key; the leader carries it out in the background. Of the answer only the ID says anything yet.
func (c *Client) RotateKeys(ctx context.Context, r RotateRequest) (k KeyRotation, err error) {
	return k, c.do(ctx, http.MethodPost, "keys/rotate", r, &k)
}
