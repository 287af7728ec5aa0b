package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"time"

	"k8s.io/apiserver/pkg/authentication/user"
	apirequest "k8s.io/apiserver/pkg/endpoints/request"
	"k8s.io/component-base/version"

	"skein.io/skein/consensus/backup"
	"skein.io/skein/consensus/host"
	"skein.io/skein/node/client"
)

// backupStall is how long a reader of a backup may take for one piece of it: the database cannot reuse space meanwhile.
const backupStall = time.Minute

const backupPath = client.BackupPath

// rootKey marks requests of the control socket, which only root can open.
type rootKey struct{}

// mayReadAll refuses whoever may not read every secret of the cluster, which is what holds or opens.
func mayReadAll(ctx context.Context, what, do string) error {
	if ctx.Value(rootKey{}) != nil {
		return nil
	}
	who := "nobody"
	if u, ok := apirequest.UserFrom(ctx); ok {
		if slices.Contains(u.GetGroups(), user.SystemPrivilegedGroup) {
			return nil
		}
		who = u.GetName()
	}
	return refusal(http.StatusForbidden, "%s every secret of the cluster: only members of the group %s and root on a node may %s, not %s", what, user.SystemPrivilegedGroup, do, who)
}

// serveBackup streams a backup. What goes wrong after the first byte breaks the connection, so that nobody takes the rest for whole;
// the file's own end says the same.
func (n *node) serveBackup(w http.ResponseWriter, r *http.Request) {
	err := mayReadAll(r.Context(), "a backup holds", "make one")
	var q client.BackupRequest
	if err == nil {
		if err = json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBody)).Decode(&q); err != nil {
			err = refusal(http.StatusBadRequest, "backup request: %v", err)
		}
	}
	if err != nil {
		writeRefusal(w, err)
		return
	}
	out := &patient{w: w, c: http.NewResponseController(w)}
	w.Header().Set("Content-Type", "application/octet-stream")
	if _, err := n.writeBackup(r.Context(), out, []byte(q.Passphrase), false); err != nil {
		n.log.Warn("a backup failed", "err", err)
		if out.begun {
			panic(http.ErrAbortHandler)
		}
		w.Header().Del("Content-Type")
		writeRefusal(w, err)
	}
}

// patient gives the reader time for every piece, and no more.
type patient struct {
	w     io.Writer
	c     *http.ResponseController
	begun bool
}

func (p *patient) Write(b []byte) (int, error) {
	p.begun = true
	_ = p.c.SetWriteDeadline(time.Now().Add(backupStall)) // not every connection has one
	return p.w.Write(b)
}

// writeBackup writes the state of all shards at one moment.
func (n *node) writeBackup(ctx context.Context, w io.Writer, passphrase []byte, scheduled bool) (backup.Header, error) {
	var encoded []byte
	if ring, _ := n.ring.Ring(); !ring.Empty() {
		encoded = ring.Encode()
	}
	box, err := backup.Seal(encoded, passphrase)
	if err != nil {
		return backup.Header{}, err
	}
	cut, err := n.host.Cut(ctx)
	if errors.Is(err, host.ErrNoReplica) {
		return backup.Header{}, n.notHere("make a backup")
	}
	if err != nil {
		return backup.Header{}, err
	}
	h := backup.Header{
		Cluster: n.id.ClusterID, Created: time.Now().UTC().Truncate(time.Second), Node: n.cfg.Name,
		Version: version.Get().GitVersion, Scheduled: scheduled, Settings: n.id.Cluster, HeldMicroseconds: cut.Held.Microseconds(),
	}
	var sources []backup.Source
	for _, i := range cut.Images {
		h.Shards = append(h.Shards, backup.Shard{ID: uint64(i.Shard.ID), Name: i.Shard.Name, Prefixes: i.Shard.Prefixes, Revision: i.Revision, Index: i.Index, Size: i.Size()})
		sources = append(sources, i)
	}
	return h, errors.Join(backup.Write(w, h, box, sources), cut.Close())
}

// BackupOptions of SaveBackup.
type BackupOptions struct {
	// Replace an existing file.
	Replace bool
	// Passphrase seals the keys in the backup. Empty: they are in clear.
	Passphrase []byte
}

// BackupInfo says what a backup holds.
type BackupInfo struct {
	backup.Header
	// Sealed tells that a passphrase is needed to restore it.
	Sealed bool `json:"sealed"`
	// Size of the databases in bytes.
	Size int64 `json:"size"`
	// Held is how long writers waited.
	Held time.Duration `json:"-"`
}

// readBackup checks a whole backup.
func readBackup(r io.Reader, h backup.Handler) (i BackupInfo, err error) {
	ring := h.Ring
	h.Ring = func(b backup.Box) error {
		i.Sealed = b.Sealed
		if ring == nil {
			return nil
		}
		return ring(b)
	}
	i.Header, err = backup.Read(r, h)
	for _, s := range i.Shards {
		i.Size += s.Size
	}
	i.Held = time.Duration(i.HeldMicroseconds) * time.Microsecond
	return i, err
}

// SaveBackup has a node make a backup, checks it as it comes, and puts it into a file, whole or not at all; "-" is standard output.
func SaveBackup(ctx context.Context, c *client.Client, path string, o BackupOptions) (i BackupInfo, err error) {
	save := func(w io.Writer) error {
		body, err := c.Backup(ctx, client.BackupRequest{Passphrase: string(o.Passphrase)})
		if err != nil {
			return err
		}
		defer body.Close()
		i, err = readBackup(io.TeeReader(body, w), backup.Handler{})
		return err
	}
	if path == "-" {
		return i, save(os.Stdout)
	}
	err = backup.WriteFile(path, o.Replace, save)
	if errors.Is(err, os.ErrExist) {
		err = fmt.Errorf("%s exists already: name another file, or replace it with --force", path)
	}
	return i, err
}

// VerifyBackup reads a whole backup file and says what is in it. "-" is standard input.
func VerifyBackup(path string) (i BackupInfo, err error) {
	f := os.Stdin
	if path != "-" {
		if f, err = os.Open(path); err != nil {
			return i, err
		}
		defer f.Close()
	}
	if i, err = readBackup(f, backup.Handler{}); err != nil {
		err = fmt.Errorf("%s: %w", path, err)
	}
	return i, err
}
