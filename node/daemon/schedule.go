package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/robfig/cron/v3"
	clientv3 "go.etcd.io/etcd/client/v3"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"skein.io/skein/consensus/backup"
	"skein.io/skein/node/client"
)

// BackupSchedule of a node: while it leads the cluster, it makes backups by it. Give all nodes the same.
type BackupSchedule struct {
	// Dir gets the files, and may hold others. Empty: no scheduled backups. A directory that all nodes share keeps them together; else
	// they are on the node that led at the time.
	Dir string
	// Schedule is a cron expression of five fields, in UTC, or @hourly, @daily, @every 6h. Default @daily.
	Schedule string
	// Keep is how many to keep. Default 7; negative: any number.
	Keep int
	// KeepFor is how long to keep them. Default: for ever. The newest is kept in any case.
	KeepFor time.Duration
	// PassphraseFile has the passphrase that seals the keys in them. Default: they are in clear.
	PassphraseFile string
}

func (b *BackupSchedule) setDefaults() {
	if b.Dir == "" {
		return
	}
	if b.Schedule == "" {
		b.Schedule = "@daily"
	}
	if b.Keep == 0 {
		b.Keep = 7
	}
}

func (b *BackupSchedule) validate() (errs []error) {
	if b.Dir == "" {
		if b.Schedule != "" || b.PassphraseFile != "" || b.KeepFor != 0 {
			errs = append(errs, errors.New("scheduled backups need a directory (--backup-dir)"))
		}
		return errs
	}
	if !filepath.IsAbs(b.Dir) {
		errs = append(errs, fmt.Errorf("backup directory %q: want an absolute path", b.Dir))
	}
	if _, err := cron.ParseStandard(b.Schedule); err != nil {
		errs = append(errs, fmt.Errorf("backup schedule %q: %w", b.Schedule, err))
	}
	if b.KeepFor < 0 {
		errs = append(errs, fmt.Errorf("backups are kept for %s: want zero or more", b.KeepFor))
	}
	return errs
}

// backupKey is where the store keeps what became of the last scheduled backups.
const backupKey = "/skein/cluster/backup"

const (
	backupRecordVersion = 1
	// A failed backup is tried again after backupRetry, doubled up to backupRetryMax, or when the next is due.
	backupRetry    = time.Minute
	backupRetryMax = 30 * time.Minute
	backupSuffix   = ".skb"
	backupStamp    = "20060102T150405Z"
)

type backupRecord struct {
	Version int `json:"version"`
	client.BackupStatus
}

func readBackupRecord(ctx context.Context, kv clientv3.KV, opts ...clientv3.OpOption) (*client.BackupStatus, error) {
	got, err := kv.Get(ctx, backupKey, opts...)
	if err != nil || len(got.Kvs) == 0 {
		return nil, err
	}
	var r backupRecord
	if err := json.Unmarshal(got.Kvs[0].Value, &r); err != nil || r.Version != backupRecordVersion {
		return nil, fmt.Errorf("the record of backups cannot be read (version %d): %w", r.Version, err)
	}
	return &r.BackupStatus, nil
}

// nextBackup is when the next one is due. A backup that was missed is due now.
func nextBackup(s cron.Schedule, last *client.BackupStatus, failures int, now time.Time) time.Time {
	if failures > 0 {
		return now.Add(min(backupRetry<<min(failures-1, 10), backupRetryMax))
	}
	if last == nil || last.LastSuccess.IsZero() {
		return now
	}
	// The time is of the clock of the node that led then: one that is wrong moves a backup, and nothing else.
	next := s.Next(last.LastSuccess.UTC())
	if latest := s.Next(now.UTC()); next.After(latest) { // it was ahead
		next = latest
	}
	if next.Before(now) {
		return now
	}
	return next
}

// scheduledFile is a backup that the schedule made.
type scheduledFile struct {
	path    string
	created time.Time
}

// expired are the files to delete: the newest stays in any case.
func expired(files []scheduledFile, keep int, keepFor time.Duration, now time.Time) (out []scheduledFile) {
	files = slices.Clone(files)
	slices.SortFunc(files, func(a, b scheduledFile) int { return b.created.Compare(a.created) })
	for i, f := range files {
		if i > 0 && (keep > 0 && i >= keep || keepFor > 0 && now.Sub(f.created) > keepFor) {
			out = append(out, f)
		}
	}
	return out
}

// scheduledFiles lists the backups in a directory that a schedule of this cluster made: name and content have to say so.
func scheduledFiles(dir, cluster string) (out []scheduledFile, err error) {
	ents, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	for _, e := range ents {
		stamp, ok := strings.CutPrefix(e.Name(), "skein-"+cluster+"-")
		stamp, suffix := strings.CutSuffix(stamp, backupSuffix)
		at, err := time.Parse(backupStamp, stamp)
		if !ok || !suffix || err != nil || !e.Type().IsRegular() {
			continue
		}
		path := filepath.Join(dir, e.Name())
		if h, err := readHeader(path); err == nil && h.Scheduled && h.Cluster == cluster {
			out = append(out, scheduledFile{path, at})
		}
	}
	return out, nil
}

func readHeader(path string) (backup.Header, error) {
	f, err := os.Open(path)
	if err != nil {
		return backup.Header{}, err
	}
	defer f.Close()
	return backup.ReadHeader(f)
}

// runBackups makes backups to the schedule, as long as this node leads.
func (n *node) runBackups(ctx context.Context, events kubernetes.Interface) error {
	set := n.cfg.Backup
	if set.Dir == "" {
		return nil
	}
	schedule, err := cron.ParseStandard(set.Schedule)
	if err != nil {
		return err // validated
	}
	failures := 0
	for {
		c, ok := n.host.Client(systemShard)
		if !ok {
			return nil // not the leader any more
		}
		last, err := readBackupRecord(ctx, c.KV)
		if err != nil {
			n.log.Warn("cannot read when the last backup was made", "err", err)
			if !pause(ctx, 10*time.Second) {
				return nil
			}
			continue
		}
		now := time.Now()
		if !pause(ctx, nextBackup(schedule, last, failures, now).Sub(now)) {
			return nil
		}
		status := client.BackupStatus{}
		if last != nil {
			status = *last
		}
		failures++
		if err = n.scheduledBackup(ctx, set, &status); err == nil {
			failures = 0
		}
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			status.LastError, status.LastErrorTime = err.Error(), time.Now().UTC().Truncate(time.Second)
			n.log.Warn("the scheduled backup failed", "err", err, "again in", min(backupRetry<<min(failures-1, 10), backupRetryMax))
			n.logIf("say so in an event", n.backupEvent(ctx, events, err))
		}
		b, err := json.Marshal(backupRecord{backupRecordVersion, status})
		if err != nil {
			return err
		}
		if _, err := c.KV.Put(ctx, backupKey, string(b)); err != nil && ctx.Err() == nil {
			n.log.Warn("cannot record the backup", "err", err)
			if !pause(ctx, 10*time.Second) {
				return nil
			}
		}
	}
}

// scheduledBackup makes one, reads it back, and deletes those that are too old.
func (n *node) scheduledBackup(ctx context.Context, set BackupSchedule, status *client.BackupStatus) error {
	pass, err := readPassphrase(set.PassphraseFile)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(set.Dir, 0o700); err != nil {
		return fmt.Errorf("backup directory: %w", err)
	}
	prefix := "skein-" + n.id.ClusterID + "-"
	partial, _ := filepath.Glob(filepath.Join(set.Dir, prefix+"*"+backupSuffix+".partial-*")) // of a daemon that was killed
	for _, p := range partial {
		if i, err := os.Stat(p); err == nil && time.Since(i.ModTime()) > time.Hour { // another node may be at it
			n.logIf("remove an unfinished backup", os.Remove(p))
		}
	}
	now := time.Now().UTC().Truncate(time.Second)
	path := filepath.Join(set.Dir, prefix+now.Format(backupStamp)+backupSuffix)
	var h backup.Header
	err = backup.WriteFile(path, true, func(w io.Writer) (err error) {
		h, err = n.writeBackup(ctx, w, pass, true)
		return err
	})
	if err != nil {
		return err
	}
	info, err := VerifyBackup(path)
	if err != nil {
		return fmt.Errorf("what was written does not read back: %w", errors.Join(err, os.Remove(path)))
	}
	*status = client.BackupStatus{LastSuccess: now, File: path, Node: n.cfg.Name, Bytes: info.Size, HeldMicroseconds: h.HeldMicroseconds}
	n.log.Info("made a backup", "file", path, "bytes", info.Size, "writers waited", info.Held)
	files, err := scheduledFiles(set.Dir, n.id.ClusterID)
	if err != nil {
		return fmt.Errorf("list the backups: %w", err)
	}
	for _, f := range expired(files, set.Keep, set.KeepFor, now) {
		if err := os.Remove(f.path); err != nil {
			n.log.Warn("cannot delete an old backup", "err", err)
			continue
		}
		n.log.Info("deleted an old backup", "file", f.path)
	}
	return nil
}

func readPassphrase(path string) ([]byte, error) {
	if path == "" {
		return nil, nil
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("passphrase: %w", err)
	}
	if b = []byte(strings.TrimRight(string(b), "\r\n")); len(b) == 0 {
		return nil, fmt.Errorf("passphrase: %s is empty", path)
	}
	return b, nil
}

// backupEvent is for people who watch events rather than `skein status`.
func (n *node) backupEvent(ctx context.Context, c kubernetes.Interface, why error) error {
	now := metav1.Now()
	msg := "The scheduled backup failed: " + why.Error()
	_, err := c.CoreV1().Events(metav1.NamespaceDefault).Create(ctx, &corev1.Event{
		ObjectMeta:     metav1.ObjectMeta{GenerateName: "skein-backup-"},
		InvolvedObject: corev1.ObjectReference{Kind: "Node", APIVersion: "v1", Name: n.cfg.Name},
		Type:           corev1.EventTypeWarning, Reason: "BackupFailed", Message: msg[:min(len(msg), 1024)],
		Source: corev1.EventSource{Component: "skein", Host: n.cfg.Name}, FirstTimestamp: now, LastTimestamp: now, Count: 1,
	}, metav1.CreateOptions{})
	return err
}

// reportBackups shows what became of the last scheduled backups; any node with a replica knows.
func (n *node) reportBackups(ctx context.Context) *client.BackupStatus {
	c, ok := n.host.Client(systemShard)
	if !ok {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	b, err := readBackupRecord(ctx, c.KV, clientv3.WithSerializable())
	if err != nil || b == nil {
		return nil
	}
	var failed error
	last := "none yet"
	if !b.LastSuccess.IsZero() {
		last = fmt.Sprintf("last %s on %s, %d kB: %s", b.LastSuccess.Format(time.RFC3339), b.Node, b.Bytes>>10, b.File)
	}
	if b.LastError != "" {
		failed = fmt.Errorf("%s: %s (%s)", b.LastErrorTime.Format(time.RFC3339), b.LastError, last)
	}
	n.parts.set("backup", failed, last)
	return b
}
