package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"skein.io/skein/node/client"
)

type keysCmd struct {
	Status keysStatusCmd `cmd:"" help:"Show the keys, who has them, and how far a rotation is."`
	Rotate keysRotateCmd `cmd:"" help:"Make a new key, seal everything anew with it in the background, then destroy the old one."`
}

type keysStatusCmd struct {
	targetFlag
	output
}

func (k *keysStatusCmd) Run(ctx context.Context) error {
	c, err := k.client()
	if err != nil {
		return err
	}
	s, err := c.Keys(ctx)
	if err != nil {
		return err
	}
	return k.print(s, func(w io.Writer) {
		fmt.Fprintln(w, "KEY\tMADE\tUSE\tON")
		for _, x := range s.Keys {
			use := "opens"
			if x.ID == s.Primary {
				use = "seals"
			}
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", x.ID, x.Created.Format(time.RFC3339), use, holders(s.Replicas, x.ID))
		}
		for _, r := range s.Replicas {
			if r.Error != "" {
				fmt.Fprintf(w, "%s does not answer: %s\n", r.Node, r.Error)
			}
		}
		switch {
		case s.Rotation != nil:
			fmt.Fprintln(w, rotationLine(*s.Rotation))
		case s.Last != nil && s.Last.Refused != "":
			fmt.Fprintf(w, "last rotation, %s: refused: %s\n", s.Last.Ended.Format(time.RFC3339), s.Last.Refused)
		case s.Last != nil:
			fmt.Fprintf(w, "last rotation, %s: %s to %s, %d values sealed anew\n", s.Last.Ended.Format(time.RFC3339), s.Last.From, s.Last.To, s.Last.Done)
		}
	})
}

func holders(replicas []client.KeyReplica, id string) string {
	var out []string
	for _, r := range replicas {
		if slices.Contains(r.Keys, id) {
			out = append(out, r.Node)
		}
	}
	return orDash(strings.Join(out, " "))
}

func rotationLine(r client.KeyRotation) string {
	s := "rotation: " + r.Phase
	if r.To != "" {
		s += fmt.Sprintf(", %s to %s", r.From, r.To)
	}
	if r.Total > 0 {
		s += fmt.Sprintf(", %d of %d values", r.Done, r.Total)
	}
	if r.Waits != "" {
		s += "; waits: " + r.Waits
	}
	return s
}

type keysRotateCmd struct {
	targetFlag
	Force bool          `help:"Go on although a voter does not answer; it fetches the key when it is back."`
	Wait  time.Duration `help:"How long to wait until the new key is in use." default:"1m"`
}

// keysPoll is how often the progress of a rotation is asked for.
const keysPoll = 200 * time.Millisecond

func (k *keysRotateCmd) Run(ctx context.Context) error {
	c, err := k.client()
	if err != nil {
		return err
	}
	asked, err := c.RotateKeys(ctx, client.RotateRequest{Force: k.Force})
	if err != nil {
		return err
	}
	wctx, cancel := context.WithTimeout(ctx, k.Wait)
	defer cancel()
	var last error
	for {
		s, err := c.Keys(wctx)
		switch last = err; {
		case err != nil: // a change of leaders, perhaps
		case s.Last != nil && s.Last.ID == asked.ID && s.Last.Refused != "":
			return errors.New(s.Last.Refused)
		case s.Last != nil && s.Last.ID == asked.ID, s.Rotation != nil && s.Rotation.ID == asked.ID && s.Primary == s.Rotation.To:
			fmt.Printf("secrets are sealed with the new key %s; what is stored is sealed anew in the background ('skein keys status')\n", s.Primary)
			return nil
		case s.Rotation != nil:
			last = errors.New(rotationLine(*s.Rotation))
		}
		select {
		case <-wctx.Done():
			return fmt.Errorf("the new key is not in use yet, the leader goes on with it ('skein keys status'): %w", errors.Join(last, ctx.Err()))
		case <-time.After(keysPoll):
		}
	}
}
