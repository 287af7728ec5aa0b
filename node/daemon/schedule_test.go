package daemon

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/robfig/cron/v3"

	"skein.io/skein/consensus/backup"
	"skein.io/skein/gossip/identity"
	"skein.io/skein/node/client"
)

func TestNextBackup(t *testing.T) {
	now := time.Date(2026, 5, 4, 10, 30, 0, 0, time.UTC)
	at := func(h, m int) time.Time { return time.Date(2026, 5, 4, h, m, 0, 0, time.UTC) }
	done := func(t time.Time) *client.BackupStatus { return &client.BackupStatus{LastSuccess: t} }
	for _, c := range []struct {
		name, spec string
		last       *client.BackupStatus
		failures   int
		want       time.Time
	}{
		{"the first is made at once", "@daily", nil, 0, now},
		{"one that only failed counts as none", "@daily", &client.BackupStatus{LastError: "x"}, 0, now},
		{"cron", "0 12 * * *", done(at(9, 0)), 0, at(12, 0)},
		{"a missed one is due now", "0 10 * * *", done(at(9, 0)), 0, now},
		{"an interval counts from the last", "@every 2h", done(at(10, 0)), 0, at(12, 0)},
		{"a clock that was ahead delays by one interval at most", "@every 2h", done(at(23, 0)), 0, at(12, 30)},
		{"a failure is tried again", "@daily", done(at(9, 0)), 1, now.Add(time.Minute)},
		{"and again, later", "@daily", done(at(9, 0)), 3, now.Add(4 * time.Minute)},
		{"not later than that", "@daily", done(at(9, 0)), 80, now.Add(30 * time.Minute)},
	} {
		s, err := cron.ParseStandard(c.spec)
		if err != nil {
			t.Fatal(err)
		}
		if got := nextBackup(s, c.last, c.failures, now); !got.Equal(c.want) {
			t.Errorf("%s: due at %s, want %s", c.name, got, c.want)
		}
	}
}

func TestExpired(t *testing.T) {
	now := time.Date(2026, 5, 4, 0, 0, 0, 0, time.UTC)
	var files []scheduledFile
	for i := range 6 {
		files = append(files, scheduledFile{fmt.Sprint(i), now.Add(-time.Duration(i*24) * time.Hour)})
	}
	slices.Reverse(files)
	for _, c := range []struct {
		keep    int
		keepFor time.Duration
		want    string
	}{{3, 0, "3 4 5"}, {-1, 0, ""}, {1, 0, "1 2 3 4 5"}, {-1, 50 * time.Hour, "3 4 5"}, {2, 100 * time.Hour, "2 3 4 5"}, {-1, time.Nanosecond, "1 2 3 4 5"}} {
		var got []string
		for _, f := range expired(files, c.keep, c.keepFor, now) {
			got = append(got, f.path)
		}
		if strings.Join(got, " ") != c.want {
			t.Errorf("keep %d, for %s: deletes %v, want %q", c.keep, c.keepFor, got, c.want)
		}
	}
	old := []scheduledFile{{"only", now.Add(-9999 * time.Hour)}}
	if got := expired(old, 1, time.Hour, now); len(got) != 0 {
		t.Errorf("the only backup would be deleted: %v", got)
	}
}

// What the schedule did not make it does not delete, whatever it is called.
func TestScheduledFiles(t *testing.T) {
	dir := t.TempDir()
	write := func(name, cluster string, scheduled bool) {
		h := backup.Header{Cluster: cluster, Scheduled: scheduled, Settings: identity.DefaultCluster(), Shards: []backup.Shard{{ID: 1, Name: "s", Size: 1}}}
		err := backup.WriteFile(filepath.Join(dir, name), false, func(w io.Writer) error {
			return backup.Write(w, h, backup.Box{}, []backup.Source{bytes.NewReader([]byte("x"))})
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	write("skein-c1-20260504T000000Z.skb", "c1", true)
	write("skein-c1-20260504T010000Z.skb", "c1", false) // somebody's own
	write("skein-c1-20260504T020000Z.skb", "c2", true)  // another cluster's
	write("skein-c1-yesterday.skb", "c1", true)
	write("mine.skb", "c1", true)
	if err := os.WriteFile(filepath.Join(dir, "skein-c1-20260504T030000Z.skb"), []byte("no backup"), 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := scheduledFiles(dir, "c1")
	if err != nil || len(got) != 1 || filepath.Base(got[0].path) != "skein-c1-20260504T000000Z.skb" {
		t.Errorf("%v, %v", got, err)
	}
}
