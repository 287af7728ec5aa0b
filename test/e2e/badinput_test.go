package e2e

import (
	"bufio"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"skein.io/skein/gossip/identity"
)

// badInput shows that what cannot work says so in one clear message, with an exit code, and leaves nothing half-made.
func (w *world) badInput(t *testing.T) {
	const name = "bad"
	n := get(w.lab.AddNode(background, name, 0))(t)
	defer func() {
		must(t, n.Kill(background))
	}()
	ip1 := w.node("n1").IP().String()
	join := func(token string, args ...string) error {
		return errOf(w.cli(name, append([]string{"join", "--token", token}, args...)...))
	}
	// clean: what a refused join leaves is nothing.
	clean := func(t *testing.T) {
		t.Helper()
		for _, f := range []string{"identity", "raft", "gossip", "founding.json", "desired.db"} {
			if exists(filepath.Join(n.StateDir(), f)) {
				t.Errorf("%s is left in the state directory", f)
			}
		}
	}
	oneLine := func(t *testing.T, message string) {
		t.Helper()
		if strings.Contains(message, "\n") || len(message) > 500 {
			t.Errorf("not one clear line:\n%s", message)
		}
		t.Log(message)
	}
	token := get(identity.ParseToken(w.token))(t)
	wrongSecret, otherCA := token, token
	wrongSecret.Secret = strings.Repeat("a", len(token.Secret))
	otherCA.CAHash[0] ^= 1

	t.Run("wrong token", func(t *testing.T) {
		oneLine(t, refused(t, join(wrongSecret.String(), ip1), "token"))
		clean(t)
	})
	t.Run("wrong token through a node without replica", func(t *testing.T) {
		oneLine(t, refused(t, join(wrongSecret.String(), w.node("n4").IP().String()), "token"))
		clean(t)
	})
	t.Run("no token at all", func(t *testing.T) {
		oneLine(t, refused(t, join("rubbish", ip1), "token"))
		clean(t)
	})
	t.Run("wrong CA", func(t *testing.T) {
		oneLine(t, refused(t, join(otherCA.String(), ip1), "CA", "nothing was sent"))
		clean(t)
	})
	t.Run("expired token", func(t *testing.T) {
		short := strings.Fields(w.do(t, "n2", "token", "create", "--ttl", "1s"))[0]
		time.Sleep(1100 * time.Millisecond) // the token's life is what is tested
		oneLine(t, refused(t, join(short, ip1), "expired"))
		clean(t)
	})
	t.Run("revoked token", func(t *testing.T) {
		tok := strings.Fields(w.do(t, "n2", "token", "create"))[0]
		w.do(t, "n3", "token", "revoke", tok)
		oneLine(t, refused(t, join(tok, ip1), "revoked"))
		clean(t)
	})
	t.Run("unreachable peer", func(t *testing.T) {
		oneLine(t, refused(t, join(w.token, "10.99.1.250"), "10.99.1.250"))
		clean(t)
	})
	t.Run("nothing listens there", func(t *testing.T) {
		oneLine(t, refused(t, join(w.token, n.IP().String()), "check that skein runs there"))
		clean(t)
	})
	t.Run("two nodes with one name", func(t *testing.T) {
		oneLine(t, refused(t, join(w.token, ip1, "--name", "n2"), "n2"))
		clean(t)
	})
	t.Run("impossible name", func(t *testing.T) {
		refused(t, join(w.token, ip1, "--name", "Not_A_Name"), "name")
		clean(t)
	})
	t.Run("busy port", func(t *testing.T) {
		cmd := get(n.Command(background, os.Args[0], n.IP().String()+":7947"))(t)
		cmd.Env = append(cmd.Env, roleEnv+"=listen")
		out := get(cmd.StdoutPipe())(t)
		must(t, cmd.Start())
		defer func() {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}()
		get(bufio.NewReader(out).ReadString('\n'))(t)
		refused(t, join(w.token, ip1), "7947", "taken")
		clean(t)
	})
	t.Run("state directory in use", func(t *testing.T) {
		// From another machine, so to speak, where all ports are free; and as somebody would who forgot that it runs.
		refused(t, errOf(w.cli(name, "up", "--name", "n1", "--state-dir", w.node("n1").StateDir())), "another skein", w.node("n1").StateDir())
		refused(t, errOf(w.cli("n1", "up")), "another skein")
		must(t, w.nodeReady("n1", "n1", true))
	})
	t.Run("no root", func(t *testing.T) {
		ctx, cancel := timeout(20 * time.Second)
		defer cancel()
		dir := filepath.Join(n.Dir(), "other")
		_, err := w.runIn(ctx, name, "", "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", skein(), "up", "--state-dir", dir)
		oneLine(t, refused(t, err, "root"))
		if exists(dir) {
			t.Error("a state directory is left")
		}
	})
	t.Run("an address of somebody else", func(t *testing.T) {
		refused(t, join(w.token, ip1, "--address", "10.99.1.99"), "10.99.1.99", "not an address of this machine")
		clean(t)
	})
	t.Run("no place to write", func(t *testing.T) {
		ctx, cancel := timeout(20 * time.Second)
		defer cancel()
		// A disk that is full: a file system of a few pages.
		dir := filepath.Join(n.Dir(), "full")
		script := `mkdir -p "$1" && mount -t tmpfs -o size=8k full "$1" && head -c 8192 /dev/zero > "$1/x"; shift; exec "$@"`
		_, err := w.runIn(ctx, name, "", "sh", "-c", script, "sh", dir, skein(), "up", "--state-dir", dir)
		t.Log(refused(t, err, "full"))
	})
	t.Run("unknown flag and unknown verb", func(t *testing.T) {
		refused(t, errOf(w.cli(name, "up", "--nonsense")), "nonsense")
		refused(t, errOf(w.cli(name, "frobnicate")), "frobnicate")
	})
	t.Run("no node runs here", func(t *testing.T) {
		refused(t, errOf(w.cli(name, "status")), "no Skein node runs here")
		refused(t, errOf(w.cli(name, "get", "pods")), "no node runs here")
	})
	// After all this the real token works still, and a machine that was refused can join.
	w.start(t, name, "n4")
	w.awaitReady(t, name, "n1", 30*time.Second)
	t.Run("leave", func(t *testing.T) {
		w.do(t, name, "leave")
		ctx, cancel := timeout(60 * time.Second)
		defer cancel()
		must(t, n.Wait(ctx))
		clean(t)
		eventually(t, 20*time.Second, "its Node object goes", func() error { return w.gone("n1", name) })
	})
}
